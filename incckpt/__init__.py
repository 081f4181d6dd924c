"""Incremental checkpoints for PyTorch, stored content-addressed at a URL."""
