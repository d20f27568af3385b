"""Whether this machine is Google Colab's."""

import importlib.util
from pathlib import Path

CONTENT = Path("/content")  # where Colab's notebooks run


def on_colab() -> bool:
    """True on a Colab machine."""
    try:
        return CONTENT.is_dir() and importlib.util.find_spec("google.colab") is not None
    except (ImportError, ValueError):
        return False
