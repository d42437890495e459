"""TODO onnx_oamip/repair."""
