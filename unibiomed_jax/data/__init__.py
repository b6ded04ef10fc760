"""Datasets on disk to batches of arrays."""
