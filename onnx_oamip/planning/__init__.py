"""TODO onnx_oamip/planning."""
