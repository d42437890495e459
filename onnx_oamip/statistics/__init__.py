"""TODO onnx_oamip/statistics."""
