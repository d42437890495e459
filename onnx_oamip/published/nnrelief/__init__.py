"""TODO onnx_oamip/published/nnrelief."""
