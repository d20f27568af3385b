"""The loss panel of 03. Core ipywidgets alone, which work in 7.7 (Colab) and 8.1."""

import html
import io
import time
from collections.abc import Callable

import ipywidgets as ipw

from qlora_helpers.plots import X_AXES, loss_curves


class LossPanel(ipw.VBox):
    """The losses of `LabelTrainer.fit`, live while it trains, and afterwards with sliders: smoothing, the x axis, a logarithmic scale,
    and the earlier runs of the workspace (any object with its `read_json` and `earlier_json`) to compare with. `cost` is the seconds
    that its pictures took."""

    def __init__(self, workspace):
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
