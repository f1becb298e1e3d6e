"""picotrain: one resolved config trains a small language model."""

__version__ = "0.1.0"
