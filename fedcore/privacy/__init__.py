"""Differential privacy without PyTorch: what a run promises, what it spends, and who holds it to that."""
