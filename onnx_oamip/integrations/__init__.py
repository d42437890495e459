"""TODO onnx_oamip/integrations."""
