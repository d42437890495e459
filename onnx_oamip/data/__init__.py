"""TODO onnx_oamip/data."""
