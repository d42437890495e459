"""TODO onnx_oamip/importance/oamip."""
