"""Text without what a crawl left in it, and the words by which two texts are copies."""

import html
import re
import unicodedata

# AG News' crawl replaced the & of an entity by a space (" #39;s" for "'s"), kept tags escaped and wrote line breaks as \.
_BARE_ENTITY = re.compile(r" ?(?<![&\w])(#\d{2,5}|quot|amp|lt|gt|nbsp|hellip|mdash|ndash|apos);")
_WORD = re.compile(r"\w+")
_TAG = re.compile(r"</?[A-Za-z][^<>]*>")


def clean_text(raw: str) -> str:
    """`raw` without what AG News' crawl left in it: entities, HTML tags, backslashes, control characters, runs of spaces."""
    text = html.unescape(_BARE_ENTITY.sub(r"&\1;", html.unescape(raw)))
    text = _TAG.sub(" ", text).replace("\\$", "$").replace("\\", " ")
    text = "".join(" " if unicodedata.category(c) == "Cc" else c for c in text)
    return " ".join(text.split())


def normalised(text: str) -> str:
    """`text` by its words alone, without case, punctuation and space: what a copy keeps. A text without words stays as it is."""
    folded = unicodedata.normalize("NFKC", clean_text(text.casefold())).casefold()  # first of all the names of entities
    return " ".join(_WORD.findall(folded)) or folded
