"""What leaves for a person."""
