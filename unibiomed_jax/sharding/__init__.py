"""How arrays lie on many devices."""
