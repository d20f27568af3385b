"""HeadlineClassifier: the tuned model ready to use, by notebooks, panels and the command line alike, on texts or on a file of them."""

import contextlib
import csv
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from peft import PeftModel
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from qlora_helpers.adapter import find_adapter, load_adapter, read_settings, read_temperature
from qlora_helpers.config import RunConfig, workspace_folder
from qlora_helpers.errors import DataError, ModelError, QLoraError
from qlora_helpers.model import load_base_model, load_tokenizer
from qlora_helpers.run.workspace import Workspace
from qlora_helpers.scoring import label_probabilities
from qlora_helpers.texts import clean_text, tidy_text

MOST_WORDS = 40  # of a text whose words are left out one by one: a forward pass each
_ROWS_AT_ONCE = 8192  # tokenised together: a hundred thousand rows would take gigabytes
NO_TEXT = "(no text)"  # stands where a label would, in a row without one
_LAYOUT = (
    "Name the column of texts `text`, `headline` or `title` in the first row (with `title`, a `description` is read too), or give a "
    "file of one column, or of lines as .txt"
)


class HeadlineClassifier:
    """Texts in, labels and probabilities out. Make one with `from_workspace` or `from_adapter`.
    Texts lose control characters and runs of spaces, nothing else: what AG News' crawl left is for
    `clean_text` before, as in 02. They are cut at `config.max_length` tokens. Logits are divided by
    `temperature`, which 04 fitted (1 without it)."""

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        config: RunConfig,
        temperature: float = 1.0,
    ):
        self.model, self.tokenizer, self.config, self.temperature = (
            model,
            tokenizer,
            config,
            temperature,
        )
        self.labels = config.labels

    @classmethod
    def from_workspace(cls, path: str | os.PathLike | None = None) -> "HeadlineClassifier":
        """The tuned model of a run's workspace, `path` or `workspace_folder`, with 04's temperature if 04 has run.
        Raises WorkspaceError that names the notebook to run, ConfigError if the environment asks for other settings, and ModelError."""
        workspace = Workspace(path or workspace_folder())
        config = RunConfig.from_json(workspace.open("03_qlora_training"))
        config.check_environment()
        calibration = workspace.find_json("04_evaluation", "adapter/calibration.json")
        return cls._load(
            workspace / "adapter", config, calibration["temperature"] if calibration else 1.0
        )

    @classmethod
    def from_adapter(cls, source: str | os.PathLike) -> "HeadlineClassifier":
        """The tuned model of an adapter's folder, or of `account/name` on the hub. Raises ModelError if it cannot be used."""
        folder = find_adapter(source)
        return cls._load(folder, read_settings(folder), read_temperature(folder))

    @classmethod
    def _load(cls, folder: Path, config: RunConfig, temperature: float) -> "HeadlineClassifier":
        tokenizer, base = load_tokenizer(config), load_base_model(config)
        try:
            return cls(load_adapter(base, folder), tokenizer, config, temperature)
        except QLoraError:
            raise
        except (OSError, ValueError, LookupError, RuntimeError, SafetensorError) as error:
            raise ModelError(
                f"the adapter in {folder} cannot be loaded ({str(error).strip().splitlines()[0][:200]}). Run "
                "notebooks/03_qlora_training.ipynb again, or copy the folder again from where it was made."
            ) from error

    def __call__(
        self, texts: str | Sequence[str], progress: Callable[[int], object] | None = None
    ) -> pd.DataFrame:
        """A row for each text, in order: `label`, `confidence` (its probability), and `P(label)` for each label. All are missing for a
        text that is empty or only space and control characters, and for None and NaN; a Series'
        index is kept. A bar shows if it takes long, unless `progress` is given, which is called
        with the number of rows of each batch. Raises DataError for what is not text."""
        texts = [texts] if isinstance(texts, str) else texts
        with tqdm(
            total=len(texts),
            unit="row",
            desc="classified",
            delay=3,
            mininterval=1,
            disable=progress is not None,
        ) as bar:
            return self.table(
                self.probabilities(texts, progress or bar.update),
                texts.index if isinstance(texts, pd.Series) else None,
            )

    def table(self, probabilities: np.ndarray, index: pd.Index | None = None) -> pd.DataFrame:
        """`probabilities` as the table that a call returns."""
        empty = np.isnan(probabilities).any(axis=1)
        chosen = np.where(empty[:, None], 0, probabilities).argmax(axis=1)
        label = [
            None if nothing else self.labels[i] for i, nothing in zip(chosen, empty, strict=True)
        ]
        return pd.DataFrame(
            {"label": label, "confidence": probabilities.max(axis=1)}
            | {f"P({name})": probabilities[:, i] for i, name in enumerate(self.labels)},
            index=index,
        )

    def probabilities(
        self,
        texts: Sequence[str],
        progress: Callable[[int], object] | None = None,
        base_model: bool = False,
    ) -> np.ndarray:
        """(texts, labels) float64 probabilities, in order; NaN for an empty text, as in a call.
        `base_model` asks the model without the adapter, and then without the temperature, which was
        fitted to the adapter. Raises DataError for what is not text."""
        cleaned = [_clean(text, i) for i, text in enumerate(texts)]
        found = np.full((len(cleaned), len(self.labels)), np.nan)
        with self.model.disable_adapter() if base_model else contextlib.nullcontext():
            for start in range(0, len(cleaned), _ROWS_AT_ONCE):
                part = range(start, min(start + _ROWS_AT_ONCE, len(cleaned)))
                rows = [i for i in part if cleaned[i]]
                found[rows] = label_probabilities(
                    self.model,
                    self.tokenizer,
                    [cleaned[i] for i in rows],
                    self.config,
                    progress,
                    temperature=1.0 if base_model else self.temperature,
                )
                if progress and len(rows) < len(part):
                    progress(len(part) - len(rows))
        return found

    def word_effects(self, text: str) -> pd.DataFrame:
        """How much each `word` of `text` speaks for its label. `effect` is the label's log-odds
        less those of the text without the word, in nats: odds are the label's probability over that
        of all other labels, and tell apart what a probability near 1 does not. The first 40 words,
        in one batched call; no row for a text of fewer than two."""
        words = _clean(text, 0).split()
        if len(words) < 2:
            return pd.DataFrame({"word": [], "effect": []})
        texts = [" ".join(words)] + [
            " ".join(words[:i] + words[i + 1 :]) for i in range(min(len(words), MOST_WORDS))
        ]
        found = label_probabilities(
            self.model, self.tokenizer, texts, self.config, temperature=self.temperature
        )
        found, label = np.maximum(found, 1e-300), found[0].argmax()
        log_odds = np.log(found[:, label]) - np.log(np.delete(found, label, axis=1).sum(axis=1))
        return pd.DataFrame({"word": words[:MOST_WORDS], "effect": log_odds[0] - log_odds[1:]})


def _clean(text, i: int) -> str:
    if not isinstance(text, str):
        if text is None or text is pd.NA or text != text:
            return ""
        raise DataError(
            f"text {i} is {str(text)[:40]!r} of type {type(text).__name__}: give a list of strings."
        )
    # half a surrogate pair, which a tokenizer refuses, becomes a ?
    return tidy_text(text.encode(errors="replace").decode())


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
