"""AG News rows: from the hub, a folder of CSVs or the bundled sample; cleaned, and drawn into a seeded, stratified subset."""

import csv
import html
import io
import re
import unicodedata
from importlib import resources
from pathlib import Path

import datasets
import numpy as np
import pandas as pd

from qlora_helpers.config import AG_NEWS, SAMPLE, RunConfig
from qlora_helpers.errors import DataError

LABELS = ["World", "Sports", "Business", "Sci/Tech"]
SPLITS = ["train", "validation", "test"]

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


def load_rows(config: RunConfig) -> dict[str, pd.DataFrame]:
    """The uncleaned rows behind `config.data`: {"train", "test"}, each with columns `raw` (str) and `label` (index into LABELS).
    Raises DataError that names the file, the row and the remedy."""
    if config.data == AG_NEWS:
        return _load_from_hub()
    folder = resources.files("qlora_helpers") / "sample" if config.data == SAMPLE else Path(config.data)
    return {split: _read_csv(folder / f"{split}.csv") for split in ("train", "test")}


def normalised(text: str) -> str:
    """`text` by its words alone, without case, punctuation and space: what a copy keeps. A text without words stays as it is."""
    folded = unicodedata.normalize("NFKC", clean_text(text)).casefold()
    return " ".join(_WORD.findall(folded)) or folded


def draw_subset(rows: dict[str, pd.DataFrame], config: RunConfig) -> dict[str, pd.DataFrame]:
    """The three splits, each with columns `text` and `label`, drawn with `config.seed` and shuffled.
    Training and validation rows hold each label equally often and come from `rows["train"]`, without the copies of drawn test rows
    and of one another, whose number is in `attrs["copies_dropped"]` of the training split; a smaller training split is a part of a
    larger one. Test rows keep the frequencies of `rows["test"]`. Raises DataError if a label has too few."""
    rng = np.random.default_rng(config.seed)
    order = [rng.permutation(np.flatnonzero(rows["train"].label == label)) for label in range(len(LABELS))]
    test = _proportional_draw(rows["test"], config, rng)
    words = rows["train"].raw.map(normalised)
    copies = words.isin(set(rows["test"].raw.iloc[np.concatenate(test)].map(normalised))) | words.duplicated()
    order = [indices[~copies.to_numpy()[indices]] for indices in order]
    validation_share, train_share = _equal_shares(config.validation_size), _equal_shares(config.train_size)
    for label, indices in enumerate(order):
        asked = validation_share[label] + train_share[label]
        if len(indices) < asked:
            raise DataError(f"the training rows of {config.data!r} hold {len(indices)} of {LABELS[label]}"
                            + (f" ({copies.sum()} copies are not counted)" if copies.any() else "") + ", but "
                            f"train_size={config.train_size} and validation_size={config.validation_size} need {asked}: "
                            "lower QLORA_TRAIN_SIZE or add rows.")
    drawn = {
        "validation": (rows["train"], [i[:v] for i, v in zip(order, validation_share, strict=True)]),
        "train": (rows["train"], [i[v:v + t] for i, v, t in zip(order, validation_share, train_share, strict=True)]),
        "test": (rows["test"], test),
    }
    subset = {split: _finish(*drawn[split], np.random.default_rng([config.seed, i])) for i, split in enumerate(SPLITS)}
    subset["train"].attrs["copies_dropped"] = int(copies.sum())
    return subset


def _equal_shares(size: int) -> list[int]:
    return [size // len(LABELS) + (label < size % len(LABELS)) for label in range(len(LABELS))]


def _proportional_draw(rows: pd.DataFrame, config: RunConfig, rng: np.random.Generator) -> list[np.ndarray]:
    if len(rows) < config.test_size:
        raise DataError(f"the test split of {config.data!r} has {len(rows)} rows, but test_size={config.test_size}: lower QLORA_TEST_SIZE.")
    counts = rows.label.value_counts().reindex(range(len(LABELS)), fill_value=0).to_numpy()
    for label in np.flatnonzero(counts == 0):
        raise DataError(f"the test split of {config.data!r} has no row of {LABELS[label]}: nothing could be said about it. Add some.")
    exact = counts * config.test_size / counts.sum()
    share = np.floor(exact).astype(int)
    share[np.argsort(share - exact, kind="stable")[:config.test_size - share.sum()]] += 1  # largest remainders first
    return [rng.permutation(np.flatnonzero(rows.label == label))[:n] for label, n in enumerate(share)]


def _finish(rows: pd.DataFrame, indices: list[np.ndarray], rng: np.random.Generator) -> pd.DataFrame:
    drawn = rows.iloc[rng.permutation(np.concatenate(indices))]
    return pd.DataFrame({"text": drawn.raw.map(clean_text), "label": drawn.label}).reset_index(drop=True)


def _read_csv(path: Path) -> pd.DataFrame:
    layout = 'AG News\' layout is class (1 to 4), title, description, without a header: "3","Title","Description"'
    rows = []
    try:
        with io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="") as file:
            for number, row in enumerate(csv.reader(file, strict=True), start=1):
                if not row:
                    continue
                if len(row) != 3:
                    raise DataError(f"{path}, row {number}: {len(row)} column{'s' * (len(row) != 1)} instead of 3. {layout}.")
                if row[0].strip() not in {"1", "2", "3", "4"}:
                    raise DataError(f"{path}, row {number}: class {row[0]!r} is not 1 (World), 2 (Sports), 3 (Business) or 4 (Sci/Tech).")
                if not clean_text(f"{row[1]} {row[2]}"):
                    raise DataError(f"{path}, row {number}: title and description are both empty. Remove the row.")
                rows.append((f"{row[1]} {row[2]}", int(row[0]) - 1))
    except FileNotFoundError:
        raise DataError(f"{path} is not there. QLORA_DATA names a folder with train.csv and test.csv. {layout}.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}). Save it as UTF-8, for example: iconv -f latin1 -t utf-8.") from error
    except csv.Error as error:
        raise DataError(f"{path}, after row {len(rows)}: not valid CSV ({error}). {layout}.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    if not rows:
        raise DataError(f"{path} has no rows. {layout}.")
    return pd.DataFrame(rows, columns=["raw", "label"])


def _load_from_hub() -> dict[str, pd.DataFrame]:
    try:
        splits = datasets.load_dataset(AG_NEWS)
    except Exception as error:  # the hub raises a dozen kinds; the reader needs one message
        raise DataError(f"{AG_NEWS} cannot be loaded from the hub ({type(error).__name__}). Check the connection, or set QLORA_DATA to a "
                        f"folder with train.csv and test.csv, or QLORA_DATA={SAMPLE} for the bundled sample.") from error
    return {split: splits[split].to_pandas().rename(columns={"text": "raw"})[["raw", "label"]] for split in ("train", "test")}
