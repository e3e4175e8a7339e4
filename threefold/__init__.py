"""threefold: make, understand and use a language model, whole."""

__version__ = "0.1.0"
