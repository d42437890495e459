"""TODO onnx_oamip/reporting."""
