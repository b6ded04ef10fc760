"""The model's sizes and number formats as frozen dataclasses, and how they are read.

The choices of training are in `training/config.py`.
"""
