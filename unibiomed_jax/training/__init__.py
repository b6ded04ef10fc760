"""Losses, adapters, optimiser, the step and its checkpoints."""
