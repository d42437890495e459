"""TODO onnx_oamip/core."""
