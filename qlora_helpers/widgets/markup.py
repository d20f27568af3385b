"""What the panels share: text as HTML, and the message of a failure."""

import html


def escape(text: str) -> str:
    """Return `text` as HTML that shows it, with a ? for half a surrogate pair, which no browser can
    be sent."""
    return html.escape(text.encode(errors="replace").decode())


def failure(error: Exception) -> str:
    """Return HTML that says why a text could not be classified."""
    return f"<p>This could not be classified: {escape(str(error) or type(error).__name__)}</p>"
