"""Whose machine this is: Google Colab's, Kaggle's or another."""

import importlib.util
from pathlib import Path

CONTENT = Path("/content")  # where Colab's notebooks run
KAGGLE = Path("/kaggle/working")  # where Kaggle's do


def on_kaggle() -> bool:
    """True on a Kaggle machine, whose image is built from Colab's and holds google.colab too."""
    return KAGGLE.is_dir()


def on_colab() -> bool:
    """True on a Colab machine."""
    try:
        package = importlib.util.find_spec("google.colab")
    except (ImportError, ValueError):
        package = None
    return CONTENT.is_dir() and package is not None and not on_kaggle()


def machine_name() -> str:
    """Return whose machine this is, in a word."""
    if on_kaggle():
        return "Kaggle"
    return "Colab" if on_colab() else "other"
