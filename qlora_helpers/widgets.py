"""The loss panel of 03 and the error explorer of 04. Core ipywidgets alone, which work in 7.7 (Colab) and 8.1."""

import html
import io
import time
from collections.abc import Callable, Sequence

import ipywidgets as ipw
import numpy as np
import pandas as pd

from qlora_helpers.plots import X_AXES, loss_curves
from qlora_helpers.run.workspace import Workspace


class LossPanel(ipw.VBox):
    """The losses of `LabelTrainer.fit`, live while it trains, and afterwards with sliders: smoothing, the x axis, a logarithmic scale,
    and the earlier runs of the workspace to compare with. `cost` is the seconds that its pictures took."""

    def __init__(self, workspace: Workspace):
        self.workspace, self.history, self._earlier = workspace, None, {}
        self.cost, self._last, self._start = 0.0, 0.0, time.perf_counter()
        self.status, self.picture = (
            ipw.HTML(),
            ipw.Image(format="png", layout=ipw.Layout(max_width="100%")),
        )
        self.smoothing = ipw.FloatSlider(0.6, min=0, max=0.95, step=0.05, description="smoothing")
        self.x = ipw.ToggleButtons(
            options=list(X_AXES), description="x axis", style={"button_width": "70px"}
        )
        self.log_scale = ipw.Checkbox(False, description="logarithmic scale")
        self.earlier = ipw.SelectMultiple(description="compare", rows=3)
        super().__init__([self.status, self.picture])
        for control in (self.smoothing, self.x, self.log_scale, self.earlier):
            control.observe(lambda change: self.draw(), names="value")

    def load(self) -> "LossPanel":
        """Show the workspace's finished training, with the controls. Works in a runtime that never trained."""
        self._earlier = self.workspace.earlier_json("training.json")
        self.earlier.options = tuple(self._earlier)
        controls = [ipw.HBox([self.smoothing, self.log_scale]), self.x] + [self.earlier] * bool(
            self._earlier
        )
        self.children = [self.status, self.picture, *controls]
        self.show(self.workspace.read_json("03_qlora_training", "training.json"))
        return self

    def live(self, history: Callable[[], dict], status: str) -> None:
        """Show `status`, and the picture of a history that is still growing if that keeps the cost below a fiftieth of the time so far."""
        if self.cost + self._last <= 0.02 * (time.perf_counter() - self._start):
            self.show(history(), status)
        else:
            self.status.value = html.escape(status)

    def show(self, history: dict, status: str = "") -> None:
        start = time.perf_counter()
        self.history = history
        self.status.value = html.escape(
            status
            or f"{history['seconds'] / 60:.1f} minutes, {history['rows_per_second']:.2f} rows/s"
        )
        self.draw()
        self._last = time.perf_counter() - start  # one more picture is expected to cost as much
        self.cost += self._last

    def draw(self) -> None:
        buffer = io.BytesIO()
        others = {name: self._earlier[name] for name in self.earlier.value}
        loss_curves(
            self.history, self.x.value, self.smoothing.value, self.log_scale.value, others
        ).savefig(buffer, dpi=90)
        self.picture.value = buffer.getvalue()


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
