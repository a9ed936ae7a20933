"""PyTorch on digits, in the shape of Flower's quick-start."""
