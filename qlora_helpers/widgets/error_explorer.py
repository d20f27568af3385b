"""The error explorer of 04. Core ipywidgets alone, which work in 7.7 (Colab) and 8.1."""

import html
from collections.abc import Sequence

import ipywidgets as ipw
import numpy as np
import pandas as pd


def review_table(
    texts: Sequence[str],
    references: Sequence[int],
    probabilities: np.ndarray,
    labels: Sequence[str],
) -> pd.DataFrame:
    """Each row's `text`, `true` and `predicted` label, and `confidence`: the most confident first."""
    table = pd.DataFrame(
        {
            "text": list(texts),
            "true": [labels[i] for i in references],
            "predicted": [labels[i] for i in probabilities.argmax(axis=1)],
            "confidence": probabilities.max(axis=1),
        }
    )
    return table.sort_values("confidence", ascending=False, kind="stable")


class ErrorExplorer(ipw.VBox):
    """Choose a cell of the confusion matrix and read its headlines, the most confident first. `table` comes from `review_table`."""

    def __init__(self, table: pd.DataFrame, labels: Sequence[str], rows: int = 20):
        self.table, self.rows, self.shown = table, rows, table.iloc[:0]
        counts = table.groupby(["true", "predicted"]).size()
        self.true = ipw.Dropdown(options=labels, description="true")
        self.predicted = ipw.Dropdown(options=labels, description="predicted")
        self.answer = ipw.HTML()
        super().__init__([ipw.HBox([self.true, self.predicted]), self.answer])
        for control in (self.true, self.predicted):
            control.observe(lambda change: self.show(), names="value")
        errors = counts[[true != predicted for true, predicted in counts.index]]
        if len(errors):  # start where most errors are
            self.true.value, self.predicted.value = errors.idxmax()
        self.show()

    def show(self) -> None:
        cell = self.table[
            (self.table.true == self.true.value) & (self.table.predicted == self.predicted.value)
        ]
        self.shown = cell.head(self.rows)
        lines = "".join(
            f"<tr><td style='padding-right:1em'>{row.confidence:.1%}</td><td>{html.escape(row.text)}</td></tr>"
            for row in self.shown.itertuples()
        )
        self.answer.value = (
            f"<p>{len(cell)} of {len(self.table)} rows"
            + f", the {len(self.shown)} most confident" * (len(cell) > len(self.shown))
            + f":</p><table style='text-align:left'>{lines}</table>"
        )
