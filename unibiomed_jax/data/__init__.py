"""Datasets on disk to batches of arrays: records, prompts, transforms, and the pipeline over them."""
