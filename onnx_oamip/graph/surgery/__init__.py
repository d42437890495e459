"""TODO onnx_oamip/graph/surgery."""
