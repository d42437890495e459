"""ONNX graphs: loading, shapes, execution, operators, coupling, cost and surgery."""
