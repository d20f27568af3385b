"""The loss panel of 03, of core ipywidgets that work in 7.7 (Colab) and 8.1."""

import io
import time
from collections.abc import Callable

import ipywidgets as ipw

from qlora_helpers.plots import X_AXES, loss_curves
from qlora_helpers.widgets.markup import escape


class LossPanel(ipw.VBox):
    """The losses of a training: live while it runs, and with controls afterwards.

    `workspace` is any object with a Workspace's `read_json` and `earlier_json`. `cost` is the
    seconds that the pictures took.
    """

    def __init__(self, workspace):
        self.workspace, self.history, self._earlier = workspace, None, {}
        self.cost, self._last, self._start = 0.0, 0.0, time.perf_counter()
        self.status = ipw.HTML()
        self.picture = ipw.Image(format="png", layout=ipw.Layout(max_width="100%"))
        self.smoothing = ipw.FloatSlider(0.6, min=0, max=0.95, step=0.05, description="smoothing")
        style = {"button_width": "70px"}
        self.x = ipw.ToggleButtons(options=list(X_AXES), description="x axis", style=style)
        self.log_scale = ipw.Checkbox(False, description="logarithmic scale")
        self.earlier = ipw.SelectMultiple(description="compare", rows=3)
        super().__init__([self.status, self.picture])
        for control in (self.smoothing, self.x, self.log_scale, self.earlier):
            control.observe(lambda change: self.draw(), names="value")

    def load(self) -> "LossPanel":
        """Show the workspace's finished training, with the controls, and return the panel."""
        earlier = self.workspace.earlier_json("training.json")
        # one from Drive has no manifest, and may be anything
        self._earlier = {n: h for n, h in earlier.items() if {"train", "validation"} <= h.keys()}
        self.earlier.options = tuple(self._earlier)
        controls = [ipw.HBox([self.smoothing, self.log_scale]), self.x]
        if self._earlier:
            controls.append(self.earlier)
        self.children = [self.status, self.picture, *controls]
        history = self.workspace.read_json("03_qlora_training", "training.json")
        minutes, speed = history["seconds"] / 60, history["rows_per_second"]
        self.show(history, f"{minutes:.1f} minutes, {speed:.2f} rows/s")
        return self

    def live(self, history: Callable[[], dict], status: str) -> None:
        """Show `status`, and the picture of a growing history in at most a fiftieth of the time."""
        if self.cost + self._last <= 0.02 * (time.perf_counter() - self._start):
            self.show(history(), status)
        else:
            self.status.value = escape(status)

    def show(self, history: dict, status: str) -> None:
        """Show `status` and the picture of a history."""
        start = time.perf_counter()
        self.history, self.status.value = history, escape(status)
        self.draw()
        # The next picture is expected to take as long.
        self._last = time.perf_counter() - start
        self.cost += self._last

    def draw(self) -> None:
        """Draw the history as the controls say."""
        earlier = {name: self._earlier[name] for name in self.earlier.value}
        choices = (self.x.value, self.smoothing.value, self.log_scale.value, earlier)
        buffer = io.BytesIO()
        loss_curves(self.history, *choices).savefig(buffer, dpi=90)
        self.picture.value = buffer.getvalue()
