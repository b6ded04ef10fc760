"""Masks as arrays: sizes, measures, pictures."""
