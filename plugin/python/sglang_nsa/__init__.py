"""The metadata of draft attention backends computed once, inside SGLang."""

__version__ = "0.1.0"
