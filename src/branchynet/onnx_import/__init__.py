"""PyTorch networks from ONNX files, with trainable weights."""
