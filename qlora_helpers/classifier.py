"""HeadlineClassifier: texts in, labels and probabilities out; and the same for a file of texts."""

import contextlib
import csv
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from peft import PeftModel
from tqdm import tqdm

from qlora_helpers.adapter import CALIBRATION, find_adapter, load_adapter, read_adapter
from qlora_helpers.config import RunConfig, workspace_folder
from qlora_helpers.errors import DataError, ModelError
from qlora_helpers.model import load_base_model, load_tokenizer
from qlora_helpers.run.workspace import Workspace
from qlora_helpers.scoring import label_probabilities
from qlora_helpers.texts import (
    clean_text,
    is_ag_news_row,
    printable,
    read_csv,
    split_lines,
    tidy_text,
)

MOST_WORDS = 40  # of a text whose words are left out one by one: a forward pass each
NO_TEXT = "(no text)"  # the label of a row without a text
Progress = Callable[[int], object] | None  # called with the number of rows of each batch
_FORMULA = re.compile(r"\s*([=@]|[+-](?![\d.,\s]*$))")
_ROWS_AT_ONCE = 8192  # tokenised together: a hundred thousand rows would take gigabytes


class HeadlineClassifier:
    """Texts in, labels and probabilities out. Make one with `from_workspace` or `from_adapter`.

    Texts lose control characters and runs of spaces, and are cut at `config.max_length` tokens.
    Rows of AG News need `clean_text` before. Logits are divided by `temperature`, which 04 fits.
    """

    def __init__(self, model: PeftModel, tokenizer, config: RunConfig, temperature: float = 1.0):
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.temperature, self.labels = temperature, config.labels

    @classmethod
    def from_workspace(cls, path: str | os.PathLike | None = None) -> "HeadlineClassifier":
        """Return the tuned model of the run in `path`, else in `workspace_folder()`.

        Raises WorkspaceError that names the notebook to run, ConfigError if the environment asks
        for other settings than the run's, and ModelError.
        """
        workspace = Workspace(path or workspace_folder())
        config = RunConfig.from_json(workspace.open("03_qlora_training"))
        config.check_environment()
        workspace.find_json("04_evaluation", f"adapter/{CALIBRATION}")  # one that 04 wrote
        _, temperature, _ = read_adapter(workspace / "adapter")
        return cls._load(workspace / "adapter", config, temperature)

    @classmethod
    def from_adapter(cls, source: str | os.PathLike) -> "HeadlineClassifier":
        """Return the tuned model of an adapter's folder, or of `account/name` on the hub.

        Raises ModelError if it cannot be used.
        """
        folder = find_adapter(source)
        config, temperature, _ = read_adapter(folder)  # before gigabytes are fetched
        return cls._load(folder, config, temperature)

    @classmethod
    def _load(cls, folder: Path, config: RunConfig, temperature: float) -> "HeadlineClassifier":
        tokenizer = load_tokenizer(config)
        return cls(load_adapter(load_base_model(config), folder), tokenizer, config, temperature)

    def __call__(self, texts: str | Sequence[str], progress: Progress = None) -> pd.DataFrame:
        """Return a row for each text, in order.

        Args:
            texts: a text, or several. One that is None, NaN or blank gets a row of missing values.
            progress: called with the number of rows of each batch, in place of a progress bar.
        Returns:
            `label`, `confidence` (its probability) and `P(label)` for each label, with the index of
            `texts` if that is a Series. Raises DataError for what is not a text.
        """
        texts = [texts] if isinstance(texts, str) else texts
        with tqdm(total=len(texts), unit="row", delay=3, disable=progress is not None) as bar:
            probabilities = self.probabilities(texts, progress or bar.update)
        return self.table(probabilities, texts.index if isinstance(texts, pd.Series) else None)

    def table(self, probabilities: np.ndarray, index: pd.Index | None = None) -> pd.DataFrame:
        """Return `probabilities` (texts, labels) as the table that a call returns."""
        empty = np.isnan(probabilities).any(axis=1)
        best = np.where(empty[:, None], 0, probabilities).argmax(axis=1)
        label = np.where(empty, None, np.array(self.labels, dtype=object)[best])
        columns = {"label": label, "confidence": probabilities.max(axis=1)}
        columns |= {f"P({name})": probabilities[:, i] for i, name in enumerate(self.labels)}
        return pd.DataFrame(columns, index=index)

    def probabilities(
        self, texts: Sequence[str], progress: Progress = None, base_model: bool = False
    ) -> np.ndarray:
        """Return the (texts, labels) probabilities in float64; NaN for an empty text.

        `base_model` asks the model without the adapter, and without the temperature, which was
        fitted to the adapter. Raises DataError for what is not a text.
        """
        cleaned = [_clean(text, i) for i, text in enumerate(texts)]
        rows = [i for i, text in enumerate(cleaned) if text]
        if progress and len(rows) < len(cleaned):
            progress(len(cleaned) - len(rows))
        temperature = 1.0 if base_model else self.temperature
        probabilities = np.full((len(cleaned), len(self.labels)), np.nan)
        with self.model.disable_adapter() if base_model else contextlib.nullcontext():
            for start in range(0, len(rows), _ROWS_AT_ONCE):
                part = rows[start : start + _ROWS_AT_ONCE]
                probabilities[part] = self._score([cleaned[i] for i in part], temperature, progress)
        return probabilities

    def word_effects(self, text: str) -> pd.DataFrame:
        """Return how much each `word` of `text` speaks for its label.

        `effect` is the label's log-odds less those of the text without the word, in nats: odds are
        the label's probability over that of all other labels, and tell apart what a probability
        near 1 does not. The first 40 words, in one call; no row for a text of fewer than two.
        """
        words = _clean(text, 0).split()
        if len(words) < 2:
            return pd.DataFrame({"word": [], "effect": []})
        without = [words[:i] + words[i + 1 :] for i in range(min(len(words), MOST_WORDS))]
        texts = [" ".join(part) for part in [words, *without]]
        probabilities = np.maximum(self._score(texts, self.temperature), 1e-300)
        label = probabilities[0].argmax()
        others = np.delete(probabilities, label, axis=1).sum(axis=1)
        log_odds = np.log(probabilities[:, label]) - np.log(others)
        return pd.DataFrame({"word": words[:MOST_WORDS], "effect": log_odds[0] - log_odds[1:]})

    def _score(self, texts, temperature, progress=None) -> np.ndarray:
        probabilities = label_probabilities(
            self.model, self.tokenizer, texts, self.config, progress, temperature=temperature
        )
        if not np.isfinite(probabilities).all():  # NaN would pass for a row without a text
            raise ModelError(
                "the model answers with what is no number: the base weights or the adapter are "
                "damaged, or too large for this machine's dtype. Load another adapter, or train "
                "again with a lower QLORA_LEARNING_RATE."
            )
        return probabilities


def classify_file(
    classifier: HeadlineClassifier, data: bytes, name: str = "", progress: Progress = None
) -> pd.DataFrame:
    """Return the columns of a file, as `read_texts` reads it, and those of a call behind them.

    A row without a text has `NO_TEXT` for its label. A name that the file already uses is followed
    by " (predicted)". Raises DataError that names the row and the remedy.
    """
    table, texts = read_texts(data, name)
    predicted = classifier(texts, progress or (lambda rows: None))
    predicted["label"] = predicted.label.fillna(NO_TEXT)
    while clash := set(predicted.columns) & set(table.columns):
        predicted = predicted.rename(columns={column: f"{column} (predicted)" for column in clash})
    return pd.concat([table, predicted], axis=1)


def write_csv(table: pd.DataFrame) -> bytes:
    """Return `table` as CSV that a spreadsheet reads as it stands, in UTF-8.

    Each text is in quotes, so that a line end in it ends no row. A text that a spreadsheet would
    take for a formula, since it begins with = + - or @ and is no number, gets an apostrophe before.
    """
    table = table.map(_no_formula).rename(columns=_no_formula)
    csv_text = table.to_csv(index=False, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    return printable(csv_text).encode()


def _no_formula(cell):
    return f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell


def read_texts(data: bytes, name: str = "") -> tuple[pd.DataFrame, list[str]]:
    """Return the columns of a file as they stand, and the text of each row, blank rows too.

    A file whose `name` ends in .csv has a header that names `text`, `headline` or `title` (with
    `description`, if it is there), or AG News' layout, whose texts lose what the crawl left. Any
    other file is lines. Raises DataError.
    """
    if Path(name).suffix.lower() != ".csv":
        texts = split_lines(data, name or "the text")
        return pd.DataFrame({"text": texts}, dtype=object), texts
    rows = [cells for _, cells in read_csv(data, name)]
    if rows and is_ag_news_row(rows[0]):
        header, columns, clean = ["class", "title", "description"], [1, 2], clean_text
    else:
        header, *rows = rows or [[]]
        columns, clean = _text_columns(header, name), str
    rows = [cells or [""] * len(header) for cells in rows]  # a blank row keeps its place
    texts = [clean(" ".join(cells[i] for i in columns)) for cells in rows]
    return pd.DataFrame(rows, columns=header, dtype=object), texts


def _text_columns(header: list[str], name: str) -> list[int]:
    """Return the positions of the columns that hold the texts."""
    names = [cell.strip().lower() for cell in header]
    for wanted in (["text"], ["headline"], ["title", "description"], ["title"]):
        if all(names.count(column) == 1 for column in wanted):
            return [names.index(column) for column in wanted]
    raise DataError(
        f"{name}: the first row, {','.join(header)[:80]!r}, does not say which of {len(header)} "
        "columns holds the texts. Separate the columns by commas and name one of them `text`, "
        "`headline` or `title` in the first row, or give a file of lines as .txt."
    )


def _clean(text, i: int) -> str:
    if text is None or text is pd.NA or text != text:
        return ""
    if not isinstance(text, str):
        raise DataError(
            f"text {i} is {str(text)[:40]!r} of type {type(text).__name__}: give a list of strings."
        )
    return tidy_text(printable(text))
