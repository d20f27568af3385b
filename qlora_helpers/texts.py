"""Texts: cleaned, compared, and read from CSV files in AG News' layout or with labels."""

import csv
import html
import io
import re
import stat
import unicodedata
from pathlib import Path

import pandas as pd

from qlora_helpers.errors import DataError, reason

MOST_LABELS = 26  # as there are letters to ask for
MOST_BYTES = 2**28  # of a file: nine times AG News' training rows
_AG_NEWS = (
    "AG News' layout is class (1 World, 2 Sports, 3 Business, 4 Sci/Tech), title, description, "
    "without a header"
)
_LABELLED = "A labelled CSV begins with the header text,label and has one row for each text"
_REMEDY = "Commas separate the columns, and a text with a comma needs double quotes around it"
# AG News' crawl replaced the & of an entity by a space (" #39;s" for "'s"), escaped tags and wrote
# line breaks as \.
_BARE_ENTITY = re.compile(r" ?(?<![&\w])(#\d{2,5}|quot|amp|lt|gt|nbsp|hellip|mdash|ndash|apos);")
_HUGE_ENTITY = re.compile(r"&#[0-9]{20,};?")  # int() refuses a number of 4,301 digits
_WORD = re.compile(r"\w+")
_TAG = re.compile(r"</?[A-Za-z][^<>]*>")
_SEPARATOR = re.compile(r"sep=.(?=[\r\n])", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def tidy_text(raw: str) -> str:
    """Return `raw` stripped, with one space for each run of control characters and spaces."""
    return " ".join(_CONTROL.sub(" ", raw).split())


def printable(text: str) -> str:
    """Return `text` with a ? for half a surrogate pair, which no tokenizer or browser takes."""
    return text.encode(errors="replace").decode()


def clean_text(raw: str) -> str:
    """Return `raw` without what AG News' crawl left: entities, HTML tags, backslashes.

    For rows of AG News alone: it would damage `List<String>`, `?id=1&section=2` or `C:\\Users`.
    """
    text = _unescape(_BARE_ENTITY.sub(r"&\1;", _unescape(raw)))
    return tidy_text(_TAG.sub(" ", text).replace("\\$", "$").replace("\\", " "))


def same_but_case(text: str) -> str:
    """Return the key that copies share among a reader's own texts: the text without case."""
    return tidy_text(text).lower()


def normalised(text: str) -> str:
    """Return the key of copies among rows of AG News: the words without case, or else the text."""
    # The names of entities lose their case before they are cleaned.
    folded = unicodedata.normalize("NFKC", clean_text(text.casefold())).casefold()
    return " ".join(_WORD.findall(folded)) or folded


def _unescape(text: str) -> str:
    # html.unescape gives the same character for a number beyond Unicode's last
    return html.unescape(_HUGE_ENTITY.sub("\ufffd", text))


def split_lines(data: bytes, name: str) -> list[str]:
    """Return the lines of `data`, empty ones too. Raises DataError for what is not UTF-8."""
    lines = re.split("\r?\n", _decode(data, name))
    return lines if lines[-1] else lines[:-1]


def read_csv(data: bytes, name: str) -> list[tuple[int, list[str]]]:
    """Return the number, from 1, and the cells of each row; a blank row has no cells.

    Raises DataError for what is not UTF-8 or CSV, or a row that is not as wide as the first.
    """
    rows = []
    try:
        for cells in csv.reader(io.StringIO(_decode(data, name), newline=""), strict=True):
            rows.append((len(rows) + 1, cells))
    except csv.Error as error:
        where = f"{name}, after row {len(rows)}"
        raise DataError(f"{where}: not valid CSV ({error}). {_REMEDY}.") from error
    width = next((len(cells) for _, cells in rows if cells), 0)
    for number, cells in rows:
        if len(cells) not in (0, width):
            counts = f"the number of columns is {len(cells)}, not {width}"
            raise DataError(f"{name}, row {number}: {counts}. {_REMEDY}.")
    return rows


def is_labelled_csv(data: str) -> bool:
    """Return whether `data` (RunConfig.data) names a labelled CSV rather than a folder."""
    return Path(data).suffix.lower() == ".csv"


def is_ag_news_row(cells: list[str]) -> bool:
    """Return whether `cells` are a class of AG News, a title and a description."""
    return len(cells) == 3 and cells[0].strip() in ("1", "2", "3", "4")


def read_ag_news_csv(path: Path) -> pd.DataFrame:
    """Return `raw` (title and description) and `label` (0 to 3) of a file in AG News' layout."""
    rows = _read_rows(path, f"QLORA_DATA names a folder with train.csv and test.csv. {_AG_NEWS}")
    if not rows:
        raise DataError(f"{path} has no rows. {_AG_NEWS}.")
    texts = []
    for number, cells in rows:
        if not is_ag_news_row(cells):
            raise DataError(f"{path}, row {number}, {','.join(cells)[:60]!r}: {_AG_NEWS}.")
        text = f"{cells[1]} {cells[2]}"
        if not clean_text(text):
            raise DataError(f"{path}, row {number}: there is no text. Remove the row.")
        texts.append((text, int(cells[0]) - 1))
    return pd.DataFrame(texts, columns=["raw", "label"])


def read_labelled_csv(path: Path) -> pd.DataFrame:
    """Return the rows of a file with the columns `text` and `label`; others are ignored.

    Rows without a text, and copies of an earlier row but for case and space, are left out.

    Returns:
        `raw` and `label`, an index into `attrs["labels"]`, the label names in alphabetical order.
        `attrs["left_out"]` counts the rows left out by their reason; `attrs["contradictions"]` has
        a line for each copy with another label. Raises DataError as `read_csv` does.
    """
    (_, header), *rows = _read_rows(path, _LABELLED) or [(1, [])]
    columns = [name.strip().lower() for name in header]
    for name in ("text", "label"):
        if columns.count(name) != 1:
            first = f"the first row is {','.join(header)[:80]!r}"
            where = f"{path}: {first} and does not name one column {name!r}"
            raise DataError(f"{where}. {_LABELLED}. {_REMEDY}.")
    text, label = columns.index("text"), columns.index("label")
    cells = [(number, row[text], tidy_text(row[label])) for number, row in rows]
    table = pd.DataFrame(cells, columns=["row", "raw", "label"])
    table["key"] = table.raw.map(same_but_case)
    empty = table.key == ""
    table = table[~empty]
    for number in table.row[table.label == ""]:
        raise DataError(f"{path}, row {number}: there is no label. Give it one, or remove the row.")
    first = table.groupby("key")[["row", "label"]].transform("first")
    table = table.join(first.add_prefix("first_"))
    copy = table.row != table.first_row
    contradictions = [
        f"{row.raw[:60]!r} is {row.first_label!r} in row {row.first_row}, which is kept, "
        f"and {row.label!r} in row {row.row}"
        for row in table[table.label != table.first_label].itertuples()
    ]
    left_out = {"without a text": int(empty.sum()), "copies": int(copy.sum())}
    table = table.loc[~copy, ["raw", "label"]].reset_index(drop=True)
    counts = table.label.value_counts().sort_index()
    names = tuple(counts.index)
    if not 2 <= len(names) <= MOST_LABELS:
        raise DataError(
            f"{path} has {len(names)} different labels, such as {list(names[:3])}: "
            f"2 to {MOST_LABELS} can be told apart. Look whether `label` is the right column."
        )
    for name in counts.index[counts < 2]:
        raise DataError(
            f"{path}: {name!r} has a single row (copies are not counted), and a label needs one "
            "to train on and one to test on. Add rows of it, or remove it."
        )
    table["label"] = table.label.map({name: i for i, name in enumerate(names)})
    table.attrs.update(labels=names, left_out=left_out, contradictions=contradictions)
    return table


def _read_rows(path: Path, layout: str) -> list[tuple[int, list[str]]]:
    """Return `read_csv` of a file, without its blank rows."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_BYTES:
            most = f"{MOST_BYTES >> 20} MiB"
            raise DataError(f"{path} is not an ordinary file of at most {most}. {layout}.")
        return [row for row in read_csv(path.read_bytes(), str(path)) if row[1]]
    except OSError as error:
        raise DataError(f"{path} cannot be read: {reason(error)}. {layout}.") from error


def _decode(data: bytes, name: str) -> str:
    try:
        text = bytes(data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = bytes(data[: error.start]).count(b"\n") + 1
        raise DataError(
            f"{name} is not UTF-8 (line {line}). Save it as UTF-8, for example: "
            "iconv -f latin1 -t utf-8."
        ) from error
    if _SEPARATOR.match(text):
        raise DataError(
            f"{name}: the first line is {text[:5]!r}, a spreadsheet's note on what separates the "
            f"columns. Remove that line. {_REMEDY}."
        )
    return text
