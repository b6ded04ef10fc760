"""Checkpoints from PyTorch and back, driven by one set of tables."""
