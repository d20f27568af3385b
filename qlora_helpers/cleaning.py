"""Texts without control characters or what a crawl left in them, and when two texts are copies."""

import html
import re
import unicodedata

# AG News' crawl replaced the & of an entity by a space (" #39;s" for "'s"), kept tags escaped and wrote line breaks as \.
_BARE_ENTITY = re.compile(r" ?(?<![&\w])(#\d{2,5}|quot|amp|lt|gt|nbsp|hellip|mdash|ndash|apos);")
_HUGE_ENTITY = re.compile(r"&#[0-9]{20,};?")  # int() refuses a number of 4,301 digits
_WORD = re.compile(r"\w+")
_TAG = re.compile(r"</?[A-Za-z][^<>]*>")


def tidy_text(raw: str) -> str:
    """`raw` with a space for each control character and run of spaces, and none at its ends."""
    return " ".join("".join(" " if unicodedata.category(c) == "Cc" else c for c in raw).split())


def clean_text(raw: str) -> str:
    """`tidy_text` without what AG News' crawl left: entities, HTML tags, backslashes.
    For AG News' rows alone: it would damage `List<String>`, `?id=1&section=2` or `C:\\Users`."""
    text = _unescape(_BARE_ENTITY.sub(r"&\1;", _unescape(raw)))
    return tidy_text(_TAG.sub(" ", text).replace("\\$", "$").replace("\\", " "))


def same_but_case(text: str) -> str:
    """What copies among a reader's own texts share: all of the text but its case and spaces."""
    return tidy_text(text).lower()


def normalised(text: str) -> str:
    """What copies among AG News' rows share: the words, without case, punctuation and space.
    A text without words stays as it is."""
    folded = unicodedata.normalize(
        "NFKC", clean_text(text.casefold())
    ).casefold()  # first of all the names of entities
    return " ".join(_WORD.findall(folded)) or folded


def _unescape(text: str) -> str:
    # beyond Unicode's last number, html gives this character too
    return html.unescape(_HUGE_ENTITY.sub("\ufffd", text))
