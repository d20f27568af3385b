"""Texts from a CSV file or from lines, and the same table with their labels."""

import csv
import io
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from qlora_helpers.classifier import HeadlineClassifier
from qlora_helpers.errors import DataError
from qlora_helpers.texts import clean_text

NO_TEXT = "(no text)"  # stands where a label would, in a row without one
_LAYOUT = (
    "Name the column of texts `text`, `headline` or `title` in the first row (with `title`, a `description` is read too), or give a "
    "file of one column, or of lines as .txt"
)


def classify_file(
    classifier: HeadlineClassifier,
    data: bytes,
    name: str = "",
    progress: Callable[[int], object] | None = None,
) -> pd.DataFrame:
    """`read_texts` of `data`, with `label`, `confidence` and a `P(label)` for each label beside its own columns, in the same order. A row
    without a text says `(no text)` for its label. A name that the file already uses is followed by ` (predicted)`.
    `progress` is called with the number of rows of each batch. Raises DataError."""
    table, texts = read_texts(data, name)
    found = classifier(texts, progress or (lambda rows: None))
    found.label = found.label.astype(object).where(found.label.notna(), NO_TEXT)
    while clash := set(found.columns) & set(table.columns):
        found = found.rename(columns={column: f"{column} (predicted)" for column in clash})
    return pd.concat([table, found], axis=1)


def read_texts(data: bytes, name: str = "") -> tuple[pd.DataFrame, list[str]]:
    """The columns of a file as they stand, all text, and the text of each row: of a CSV if `name` ends in .csv, else its lines.
    A CSV's texts are in the columns that its first row names, or in AG News' layout without one, or
    in its only column; commas, semicolons or tabs separate them. Rows of AG News' layout lose what
    the crawl left, as in 02; other texts stay as they are. Empty lines are rows. Raises DataError
    that names the row and the remedy."""
    if Path(name).suffix.lower() != ".csv":
        texts = split_lines(data, name or "the text")
        return pd.DataFrame({"text": texts}, dtype=object), texts
    text = _decode(data, name)
    for delimiter in ",;\t":
        header = [
            cell.strip().lower()
            for cell in next(csv.reader(text.splitlines()[:1], delimiter=delimiter), [])
        ]
        if columns := [header.index(column) for column in _text_columns(header)]:
            rows = _rows(text, delimiter, name)
            return _table(rows[1:], rows[0], columns, name, first=2)
    rows = _rows(text, ",", name)
    width = max(map(len, rows), default=1)
    if width == 1:
        return _table(rows, ["text"], [0], name, first=1)
    if width == 3 and all(row[0].strip() in {"1", "2", "3", "4"} for row in rows if row):
        table, texts = _table(rows, ["class", "title", "description"], [1, 2], name, first=1)
        return table, [clean_text(text) for text in texts]
    raise DataError(
        f"{name}: the first row, {','.join(rows[0])[:80]!r}, does not say which of {width} columns holds the texts. {_LAYOUT}."
    )


def split_lines(data: bytes, name: str) -> list[str]:
    """The lines of `data`, empty ones too, without what ends them. Raises DataError for what is not UTF-8."""
    lines = _decode(data, name).split("\n")
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]


def _decode(data: bytes, name: str) -> str:
    try:
        return bytes(data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = bytes(data[: error.start]).count(b"\n") + 1
        raise DataError(
            f"{name} is not UTF-8 (line {line}). Save it as UTF-8, for example: iconv -f latin1 -t utf-8."
        ) from error


def _rows(text: str, delimiter: str, name: str) -> list[list[str]]:
    rows = []
    try:
        for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True):
            rows.append(row)
    except csv.Error as error:
        raise DataError(
            f"{name}, after row {len(rows)}: not valid CSV ({error}). {_LAYOUT}."
        ) from error
    return rows


def _text_columns(header: list[str]) -> list[str]:
    for columns in (["text"], ["headline"], ["title", "description"], ["title"]):
        if all(header.count(column) == 1 for column in columns):
            return columns
    return []


def _table(
    rows: list[list[str]], names: list[str], columns: list[int], name: str, first: int
) -> tuple[pd.DataFrame, list[str]]:
    for number, row in enumerate(rows, first):
        if row and len(row) != len(names):
            raise DataError(
                f"{name}, row {number}: {len(row)} column{'s' * (len(row) != 1)} instead of {len(names)}. Put double quotes "
                "around a text that holds a comma."
            )
    rows = [row or [""] * len(names) for row in rows]
    return pd.DataFrame(rows, columns=names, dtype=object), [
        " ".join(row[i] for i in columns) for row in rows
    ]
