"""The error explorer of 04, of core ipywidgets that work in 7.7 (Colab) and 8.1."""

from collections.abc import Sequence

import ipywidgets as ipw
import numpy as np
import pandas as pd

from qlora_helpers.widgets.markup import escape


def review_table(
    texts: Sequence[str],
    references: Sequence[int],
    probabilities: np.ndarray,
    labels: Sequence[str],
) -> pd.DataFrame:
    """Return `text`, `true`, `predicted` and `confidence` of each row, the most confident first."""
    columns = {
        "text": list(texts),
        "true": [labels[i] for i in references],
        "predicted": [labels[i] for i in probabilities.argmax(axis=1)],
        "confidence": probabilities.max(axis=1),
    }
    return pd.DataFrame(columns).sort_values("confidence", ascending=False, kind="stable")


class ErrorExplorer(ipw.VBox):
    """Two menus that choose a cell of the confusion matrix, and `rows` texts of `table` in it."""

    def __init__(self, table: pd.DataFrame, labels: Sequence[str], rows: int = 20):
        self.table, self.rows = table, rows
        self.true = ipw.Dropdown(options=labels, description="true")
        self.predicted = ipw.Dropdown(options=labels, description="predicted")
        self.answer = ipw.HTML()
        super().__init__([ipw.HBox([self.true, self.predicted]), self.answer])
        errors = table[table.true != table.predicted].groupby(["true", "predicted"]).size()
        if len(errors):
            self.true.value, self.predicted.value = errors.idxmax()
        for control in (self.true, self.predicted):
            control.observe(lambda change: self.show(), names="value")
        self.show()

    def show(self) -> None:
        """Show the texts of the chosen cell."""
        rows = self.table[self.table.true == self.true.value]
        rows = rows[rows.predicted == self.predicted.value]
        lines = "".join(
            f"<tr><td style='padding-right:1em'>{row.confidence:.1%}</td>"
            f"<td style='text-align:left'>{escape(row.text)}</td></tr>"
            for row in rows.head(self.rows).itertuples()
        )
        count = f"{len(rows)} of {len(self.table)} rows, at most {self.rows} are shown"
        self.answer.value = f"<p>{count}:</p><table>{lines}</table>"
