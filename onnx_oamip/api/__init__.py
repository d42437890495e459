"""TODO onnx_oamip/api."""
