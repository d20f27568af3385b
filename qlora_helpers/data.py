"""AG News rows: from the hub, a folder of CSVs or the bundled sample; cleaned, and drawn into a seeded, stratified subset."""

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
    """The uncleaned rows behind `config.data`: {"train", "test"}, each with columns `raw` (str) and `label` (index into config.labels).
    A labelled CSV is split here, with `config.seed`. Raises DataError that names the file, the row and the remedy."""
    if config.data == AG_NEWS:
        return _load_from_hub()
    if is_labelled_csv(config.data):
        return _split(read_labelled_csv(Path(config.data)), config)
    folder = (
        resources.files("qlora_helpers") / "sample" if config.data == SAMPLE else Path(config.data)
    )
    return {split: read_ag_news_csv(folder / f"{split}.csv") for split in ("train", "test")}


def text_rules(config: RunConfig) -> tuple[Callable[[str], str], Callable[[str], str]]:
    """How a text of `config.data` is cleaned, and what two copies of a text have in common.
    A labelled CSV holds texts of the reader's own, which lose control characters and runs of
    spaces; what AG News' crawl left is cleaned in rows of AG News' layout alone."""
    return (tidy_text, same_but_case) if is_labelled_csv(config.data) else (clean_text, normalised)


def draw_subset(rows: dict[str, pd.DataFrame], config: RunConfig) -> dict[str, pd.DataFrame]:
    """The three splits, drawn with `config.seed` and shuffled.

    Training and validation rows come from `rows["train"]`, without the copies of drawn test rows
    and of one another. They hold each label equally often; those of a labelled CSV keep its
    frequencies. Test rows keep those of `rows["test"]`. With the same rows, seed and `test_size`, a
    training split holds every row of a smaller one, whatever the validation sizes: training rows
    are taken from the beginning of an order, validation rows from its end. No row is in two splits
    of one run; a validation row of a smaller run may be a training row of a larger one.

    Returns:
        {"train", "validation", "test"}, each with columns `text` (str, by `text_rules`) and
        `label`; `attrs["copies_dropped"]` of the training split is the number of copies.
    Raises:
        DataError: there are too few rows.
    """
    rng, (clean, copy_key) = np.random.default_rng(config.seed), text_rules(config)
    order = [
        rng.permutation(np.flatnonzero(rows["train"].label == label))
        for label in range(len(config.labels))
    ]
    test = _draw_test(rows["test"], config, rng)
    keys = rows["train"].raw.map(copy_key)
    tested = rows["test"].raw.iloc[np.concatenate(test)].map(copy_key)
    copies = keys.isin(set(tested)) | keys.duplicated()
    order = [indices[~copies.to_numpy()[indices]] for indices in order]
    found = np.array([len(indices) for indices in order])
    train_share, validation_share = _shares_of(found, config)
    for label, asked in enumerate(train_share + validation_share):
        if found[label] < asked:
            raise DataError(
                f"the training rows of {config.data!r} hold {found[label]} of {config.labels[label]}"
                + (f" ({copies.sum()} copies are not counted)" if copies.any() else "")
                + ", but "
                f"train_size={config.train_size} and validation_size={config.validation_size} need {asked}: "
                "lower QLORA_TRAIN_SIZE or add rows."
            )
    drawn = {
        "train": (rows["train"], [i[:n] for i, n in zip(order, train_share, strict=True)]),
        "validation": (
            rows["train"],
            [i[len(i) - n :] for i, n in zip(order, validation_share, strict=True)],
        ),
        "test": (rows["test"], test),
    }
    subset = {
        split: _finish(*drawn[split], clean, np.random.default_rng([config.seed, i]))
        for i, split in enumerate(SPLITS)
    }
    subset["train"].attrs["copies_dropped"] = int(copies.sum())
    return subset


def _split(rows: pd.DataFrame, config: RunConfig) -> dict[str, pd.DataFrame]:
    if rows.attrs["labels"] != config.labels:
        raise DataError(
            f"{config.data} has the labels {', '.join(rows.attrs['labels'])} now, which are not those that this workspace was "
            "set up with: run notebooks/01_setup.ipynb again."
        )
    if len(rows) < (needed := config.test_size + config.validation_size + config.train_size):
        raise DataError(
            f"{config.data} has {len(rows)} rows to use (copies and empty texts are not counted), but test_size, "
            f"validation_size and train_size ask for {needed}: lower QLORA_TRAIN_SIZE, or add rows."
        )
    counts = rows.label.value_counts().sort_index().to_numpy()
    order = _label_order(counts - 1, each_first=True)  # a row of each label is left to train on
    shares = _count(order[: max(config.test_size, len(counts))], len(counts))
    drawn = np.concatenate(_draw(rows, shares, np.random.default_rng([config.seed, len(SPLITS)])))
    return {
        "train": rows.drop(index=drawn).reset_index(drop=True),
        "test": rows.iloc[np.sort(drawn)].reset_index(drop=True),
    }


def _label_order(counts: np.ndarray, each_first: bool = False) -> np.ndarray:
    """A label for each row, `counts` of them, so mixed that any beginning or end has them in
    proportion (Sainte-Laguë's method): a longer beginning never has fewer of a label than a shorter
    one. `each_first` begins with one of each label."""
    labels = np.repeat(np.arange(len(counts)), counts)
    rank = np.concatenate([np.arange(n) for n in counts])
    place = (rank + 0.5) / counts[labels]
    place[rank == 0] -= each_first
    return labels[np.argsort(place, kind="stable")]


def _count(labels: np.ndarray, label_count: int) -> np.ndarray:
    return np.bincount(labels, minlength=label_count)


def _shares_of(found: np.ndarray, config: RunConfig) -> tuple[np.ndarray, np.ndarray]:
    """How many training and validation rows each label gets, of the `found` ones."""
    labels = len(found)
    if is_labelled_csv(config.data):
        order = _label_order(found, each_first=True)
        return (
            _count(order[: max(labels, config.train_size)], labels),
            _count(order[max(labels, len(order) - config.validation_size) :], labels),
        )
    sizes = config.train_size, config.validation_size
    return tuple(_count(_label_order(np.full(labels, size))[:size], labels) for size in sizes)


def _draw_test(rows: pd.DataFrame, config: RunConfig, rng: np.random.Generator) -> list[np.ndarray]:
    if len(rows) < config.test_size:
        raise DataError(
            f"the test split of {config.data!r} has {len(rows)} rows, but test_size={config.test_size}: lower QLORA_TEST_SIZE."
        )
    counts = rows.label.value_counts().reindex(range(len(config.labels)), fill_value=0).to_numpy()
    for label in np.flatnonzero(counts == 0):
        raise DataError(
            f"the test split of {config.data!r} has no row of {config.labels[label]}: nothing could be said of it. Add some."
        )
    return _draw(rows, _count(_label_order(counts)[: config.test_size], len(counts)), rng)


def _draw(rows: pd.DataFrame, shares: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    return [
        rng.permutation(np.flatnonzero(rows.label == label))[:n] for label, n in enumerate(shares)
    ]


def _finish(
    rows: pd.DataFrame,
    indices: list[np.ndarray],
    clean: Callable[[str], str],
    rng: np.random.Generator,
) -> pd.DataFrame:
    drawn = rows.iloc[rng.permutation(np.concatenate(indices))]
    return pd.DataFrame({"text": drawn.raw.map(clean), "label": drawn.label}).reset_index(drop=True)


def _load_from_hub() -> dict[str, pd.DataFrame]:
    folder = fetch(
        AG_NEWS,
        "dataset",
        DATASET_FILES,
        DataError,
        "Or set QLORA_DATA to a folder with train.csv and test.csv, or "
        f"QLORA_DATA={SAMPLE} for the bundled sample.",
    )
    rows = {}
    for split in ("train", "test"):
        parts = sorted(str(path) for path in folder.glob(f"data/{split}-*.parquet"))
        try:
            rows[split] = (
                datasets.Dataset.from_parquet(parts)
                .to_pandas()
                .rename(columns={"text": "raw"})[["raw", "label"]]
            )
        except Exception as error:  # pyarrow's and datasets' own kinds
            raise DataError(
                f"{AG_NEWS}'s {split} rows in {folder} cannot be read ({type(error).__name__}): remove that folder and run "
                "this cell again."
            ) from error
    return rows
