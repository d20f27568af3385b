"""Texts: cleaned, compared, and read from CSV files, in AG News' own layout or any other with labels."""

import csv
import html
import io
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from qlora_helpers.errors import DataError

MOST_LABELS = 26  # as there are letters to ask for
_AG_NEWS = 'AG News\' layout is class (1 to 4), title, description, without a header: "3","Title","Description"'
_LABELLED = "A labelled CSV begins with the header text,label and has one row for each text"
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


def is_labelled_csv(data: str) -> bool:
    """Whether `data` (RunConfig.data) names one file with a header and any labels, rather than a folder in AG News' layout."""
    return Path(data).suffix.lower() == ".csv"


def read_ag_news_csv(path: Path) -> pd.DataFrame:
    """The rows of a file in AG News' layout: `raw` (title and description) and `label` (0 to 3).
    Raises DataError that names the file, the row and the remedy."""
    rows = []
    for number, row in _lines(
        path, f"QLORA_DATA names a folder with train.csv and test.csv. {_AG_NEWS}"
    ):
        if len(row) != 3:
            raise DataError(
                f"{path}, row {number}: {len(row)} column{'s' * (len(row) != 1)} instead of 3. {_AG_NEWS}."
            )
        if row[0].strip() not in {"1", "2", "3", "4"}:
            raise DataError(
                f"{path}, row {number}: class {row[0]!r} is not 1 (World), 2 (Sports), 3 (Business) or 4 (Sci/Tech)."
            )
        if not clean_text(f"{row[1]} {row[2]}"):
            raise DataError(
                f"{path}, row {number}: title and description are both empty. Remove the row."
            )
        rows.append((f"{row[1]} {row[2]}", int(row[0]) - 1))
    if not rows:
        raise DataError(f"{path} has no rows. {_AG_NEWS}.")
    return pd.DataFrame(rows, columns=["raw", "label"])


def read_labelled_csv(path: Path) -> pd.DataFrame:
    """The rows of a file with the columns `text` and `label` (others are ignored).

    Rows without a text, and copies of an earlier row but for case and space, are left out.

    Returns:
        `raw` and `label`, an index into `attrs["labels"]`, the label names in alphabetical order.
        `attrs["left_out"]` counts the rows that are left out, by their reason;
        `attrs["contradictions"]` has a line for each copy that has another label than the first.
    Raises:
        DataError: names the file, the row or label, and the remedy.
    """
    lines = _lines(path, _LABELLED)
    _, header = next(lines, (1, []))
    columns = [name.strip().lower() for name in header]
    for name in ("text", "label"):
        if columns.count(name) != 1:
            raise DataError(
                f"{path}: the first row is {','.join(header)[:80]!r} and does not name one column {name!r}. {_LABELLED}."
            )
    rows, first, contradictions = [], {}, []
    left_out = {"without a text": 0, "copies": 0, "copies with another label": 0}
    for number, row in lines:
        if len(row) != len(header):
            raise DataError(
                f"{path}, row {number}: {len(row)} column{'s' * (len(row) != 1)}, but the header names {len(header)}. Put "
                "double quotes around a text that holds a comma."
            )
        text, label = row[columns.index("text")], tidy_text(row[columns.index("label")])
        key = same_but_case(text)
        if not key:
            left_out["without a text"] += 1
            continue
        if not label:
            raise DataError(
                f"{path}, row {number}: there is no label. Give it one, or remove the row."
            )
        earlier, first_label = first.setdefault(key, (number, label))
        if earlier == number:
            rows.append((text, label))
        elif label == first_label:
            left_out["copies"] += 1
        else:
            left_out["copies with another label"] += 1
            contradictions.append(
                f"{text[:60]!r} is {first_label!r} in row {earlier}, which is "
                f"kept, and {label!r} in row {number}"
            )
    table = pd.DataFrame(rows, columns=["raw", "label"])
    counts = table.label.value_counts().sort_index()
    if not 2 <= len(counts) <= MOST_LABELS:
        raise DataError(
            f"{path} has {len(counts)} label{'s' * (len(counts) != 1)} ({', '.join(map(repr, counts.index[:3]))}"
            f"{', ...' * (len(counts) > 3)}): 2 to {MOST_LABELS} can be told apart. Look whether `label` is the right column."
        )
    if rare := counts.index[counts < 2].tolist():
        raise DataError(
            f"{path}: {', '.join(map(repr, rare))} {'have' if len(rare) > 1 else 'has'} a single row (copies are not counted), "
            "and a label needs one to train on and one to test on. Add rows of it, or remove it."
        )
    table.label = table.label.map({name: i for i, name in enumerate(counts.index)})
    table.attrs.update(labels=tuple(counts.index), left_out=left_out, contradictions=contradictions)
    return table


def _lines(path: Path, layout: str) -> Iterator[tuple[int, list[str]]]:
    """Number and columns of each row that is not blank."""
    number = 0
    try:
        with io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="") as file:
            for number, row in enumerate(csv.reader(file, strict=True), start=1):
                if row:
                    yield number, row
    except FileNotFoundError:
        raise DataError(f"{path} is not there. {layout}.") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 (byte {error.start}). Save it as UTF-8, for example: iconv -f latin1 -t utf-8."
        ) from error
    except csv.Error as error:
        raise DataError(
            f"{path}, after row {number}: not valid CSV ({error}). {layout}."
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
