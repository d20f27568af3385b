"""The rows: loaded, and drawn into a seeded, stratified subset."""

from collections.abc import Callable
from importlib import resources
from pathlib import Path

import datasets
import numpy as np
import pandas as pd

from qlora_helpers.colab.hub import DATASET_FILES, fetch
from qlora_helpers.config import AG_NEWS, SAMPLE, RunConfig
from qlora_helpers.errors import DataError
from qlora_helpers.texts import (
    clean_text,
    is_labelled_csv,
    normalised,
    read_ag_news_csv,
    read_labelled_csv,
    same_but_case,
    tidy_text,
)

SPLITS = ["train", "validation", "test"]


def load_rows(config: RunConfig) -> dict[str, pd.DataFrame]:
    """Return the uncleaned rows behind `config.data`; a labelled CSV is split with `config.seed`.

    They are {"train", "test"}, each with `raw` (str) and `label` (index into config.labels).
    Raises DataError that names the file, the row and the remedy.
    """
    if config.data == AG_NEWS:
        return _load_from_hub()
    if is_labelled_csv(config.data):
        return _split(read_labelled_csv(Path(config.data)), config)
    folder = Path(config.data)
    if config.data == SAMPLE:
        folder = resources.files("qlora_helpers") / "sample"
    return {split: read_ag_news_csv(folder / f"{split}.csv") for split in ("train", "test")}


def text_rules(config: RunConfig) -> tuple[Callable[[str], str], Callable[[str], str]]:
    """Return two functions of a text: it cleaned, and a key that is the same for its copies.

    The reader's own texts, in a labelled CSV, lose control characters and runs of spaces alone.
    """
    return (tidy_text, same_but_case) if is_labelled_csv(config.data) else (clean_text, normalised)


def draw_subset(rows: dict[str, pd.DataFrame], config: RunConfig) -> dict[str, pd.DataFrame]:
    """Return the three splits, drawn with `config.seed` and shuffled.

    Training and validation rows come from `rows["train"]`, without copies of one another and of
    drawn test rows. They hold each label equally often; those of a labelled CSV keep its
    frequencies, as test rows do. A training split holds every row of a smaller one with the same
    seed and `test_size`: training rows come from the beginning of an order, validation rows from
    its end. A validation row of a smaller run may be a training row of a larger one.

    The splits are tables of `text` (str, by `text_rules`) and `label`; `attrs["copies_dropped"]` of
    the training split is the number of copies. Raises DataError if there are too few rows.
    """
    rng = np.random.default_rng(config.seed)
    clean, copy_key = text_rules(config)
    order = _shuffled_by_label(rows["train"], len(config.labels), rng)
    test = _draw(rows["test"], _test_shares(rows["test"], config), rng)
    keys = rows["train"].raw.map(copy_key)
    test_keys = rows["test"].raw.iloc[test].map(copy_key)
    copies = (keys.isin(set(test_keys)) | keys.duplicated()).to_numpy()
    order = [indices[~copies[indices]] for indices in order]
    available = np.array([len(indices) for indices in order])
    train_shares, validation_shares = _shares(available, config)
    for label, needed in enumerate(train_shares + validation_shares):
        if available[label] < needed:
            raise DataError(
                f"the training rows of {config.data!r} hold {available[label]} of "
                f"{config.labels[label]} ({copies.sum()} copies are not counted), but "
                f"train_size={config.train_size} and validation_size={config.validation_size} "
                f"need {needed}: lower QLORA_TRAIN_SIZE or add rows."
            )
    if not train_shares.all() or not validation_shares.any():
        raise DataError(
            f"of {config.data!r}, train_size={config.train_size} and validation_size="
            f"{config.validation_size} leave a label without a training row, or no row to validate "
            "on: set larger ones, or add rows."
        )
    train = [part[:n] for part, n in zip(order, train_shares, strict=True)]
    validation = [part[len(part) - n :] for part, n in zip(order, validation_shares, strict=True)]
    drawn = {
        "train": rows["train"].iloc[np.concatenate(train)],
        "validation": rows["train"].iloc[np.concatenate(validation)],
        "test": rows["test"].iloc[test],
    }
    subset = {}
    for i, (split, table) in enumerate(drawn.items()):
        table = table.iloc[np.random.default_rng([config.seed, i]).permutation(len(table))]
        columns = {"text": table.raw.map(clean), "label": table.label}
        subset[split] = pd.DataFrame(columns).reset_index(drop=True)
    subset["train"].attrs["copies_dropped"] = int(copies.sum())
    return subset


def _shuffled_by_label(rows: pd.DataFrame, labels: int, rng) -> list[np.ndarray]:
    """Return the indices of each label's rows, in a random order."""
    return [rng.permutation(np.flatnonzero(rows.label == label)) for label in range(labels)]


def _draw(rows: pd.DataFrame, shares: np.ndarray, rng) -> np.ndarray:
    """Return the indices of `shares[i]` random rows of each label i."""
    order = _shuffled_by_label(rows, len(shares), rng)
    return np.concatenate([indices[:n] for indices, n in zip(order, shares, strict=True)])


def _split(rows: pd.DataFrame, config: RunConfig) -> dict[str, pd.DataFrame]:
    if rows.attrs["labels"] != config.labels:
        raise DataError(
            f"{config.data} has the labels {', '.join(rows.attrs['labels'])} now, which are not "
            "those that this workspace was set up with: run notebooks/01_setup.ipynb again."
        )
    labels = len(config.labels)
    # A row of each label remains to train on.
    mixed = _mixed_labels(np.bincount(rows.label) - 1, each_first=True)
    shares = np.bincount(mixed[: max(config.test_size, labels)], minlength=labels)
    rng = np.random.default_rng([config.seed, len(SPLITS)])
    drawn = np.sort(_draw(rows, shares, rng))
    return {
        "train": rows.drop(index=drawn).reset_index(drop=True),
        "test": rows.iloc[drawn].reset_index(drop=True),
    }


def _mixed_labels(counts: np.ndarray, each_first: bool = False) -> np.ndarray:
    """Return a label for each row, mixed so that any beginning or end has them in proportion.

    By Sainte-Laguë's method: a longer beginning never has fewer of a label than a shorter one.
    `each_first` begins with one of each label.
    """
    labels = np.repeat(np.arange(len(counts)), counts)
    rank = np.concatenate([np.arange(n) for n in counts])
    place = (rank + 0.5) / counts[labels]
    place[rank == 0] -= each_first
    return labels[np.argsort(place, kind="stable")]


def _shares(available: np.ndarray, config: RunConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return how many training and validation rows each label gets, of the `available` ones."""
    labels = len(available)
    if is_labelled_csv(config.data):
        mixed = _mixed_labels(available, each_first=True)
        train = mixed[: max(labels, config.train_size)]
        validation = mixed[max(labels, len(mixed) - config.validation_size) :]
    else:
        train = np.arange(config.train_size) % labels
        validation = np.arange(config.validation_size) % labels
    return np.bincount(train, minlength=labels), np.bincount(validation, minlength=labels)


def _test_shares(rows: pd.DataFrame, config: RunConfig) -> np.ndarray:
    if len(rows) < config.test_size:
        raise DataError(
            f"the test split of {config.data!r} has {len(rows)} rows, but "
            f"test_size={config.test_size}: lower QLORA_TEST_SIZE."
        )
    counts = np.bincount(rows.label, minlength=len(config.labels))
    for label in np.flatnonzero(counts == 0):
        raise DataError(
            f"the test split of {config.data!r} has no row of {config.labels[label]}: add some."
        )
    return np.bincount(_mixed_labels(counts)[: config.test_size], minlength=len(counts))


def _load_from_hub() -> dict[str, pd.DataFrame]:
    remedy = "Or set QLORA_DATA to a folder with train.csv and test.csv, or "
    remedy += f"QLORA_DATA={SAMPLE} for the bundled sample."
    folder = fetch(AG_NEWS, "dataset", DATASET_FILES, DataError, remedy)
    rows = {}
    for split in ("train", "test"):
        files = [str(path) for path in sorted(folder.glob(f"data/{split}-*.parquet"))]
        try:
            table = datasets.Dataset.from_parquet(files).to_pandas()
            rows[split] = table.rename(columns={"text": "raw"})[["raw", "label"]]
        except Exception as error:  # pyarrow and datasets raise kinds of their own
            raise DataError(
                f"{AG_NEWS}'s {split} rows in {folder} cannot be read ({type(error).__name__}): "
                "remove that folder and run this cell again."
            ) from error
    return rows
