"""What the panels share: text as HTML, and the message of a failure."""

import html


def escape(text: str) -> str:
    """Return `text` as HTML that shows it.

    Half a surrogate pair, which cannot be sent to a browser, becomes a question mark.
    """
    return html.escape(text.encode(errors="replace").decode())


def failure(error: Exception) -> str:
    """Return HTML that says why a text could not be classified."""
    return f"<p>This could not be classified: {escape(str(error) or type(error).__name__)}</p>"
