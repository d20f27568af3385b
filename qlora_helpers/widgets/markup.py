"""What the panels share: text as HTML, and the message of a failure."""

import html

from qlora_helpers.texts import printable


def escape(text: str) -> str:
    """Return `text` as HTML that shows it."""
    return html.escape(printable(text))


def failure(error: Exception) -> str:
    """Return HTML that says why a text could not be classified."""
    return f"<p>This could not be classified: {escape(str(error) or type(error).__name__)}</p>"
