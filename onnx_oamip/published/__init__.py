"""TODO onnx_oamip/published."""
