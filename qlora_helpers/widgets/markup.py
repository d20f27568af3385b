"""Text in the panels' HTML."""

import html


def escape(text: str) -> str:
    """Return `text` as HTML that shows it, with a ? for half a surrogate pair, which cannot be sent to a browser."""
    return html.escape(text.encode(errors="replace").decode())
