"""TODO onnx_oamip/verification."""
