"""From an image file and a question to text and masks."""
