"""TODO onnx_oamip/artifacts."""
