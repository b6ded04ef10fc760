"""Programs compiled for devices that nobody has here, and what they would ask of them."""
