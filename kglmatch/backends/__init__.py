"""What runs the network: PyTorch, or onnxruntime."""
