"""TODO onnx_oamip/published/dependence."""
