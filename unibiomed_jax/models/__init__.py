"""The network: pure modules, no input or output."""
