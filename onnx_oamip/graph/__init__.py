"""TODO onnx_oamip/graph."""
