"""Every choice as frozen dataclasses, and how they are read."""
