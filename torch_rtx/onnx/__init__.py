"""ONNX models as PyTorch modules: each node is a call of an operator that is declared in `ops`."""
