"""The file panel of 05: a file or lines in, a CSV with labels out. Core ipywidgets alone, which work in 7.7 (Colab) and 8.1."""

import base64
import time
from pathlib import Path

import ipywidgets as ipw
import pandas as pd

from qlora_helpers.classifier import NO_TEXT, HeadlineClassifier, classify_file, split_lines
from qlora_helpers.widgets.markup import escape


class FilePanel(ipw.VBox):
    """Upload a CSV (or .txt), or paste lines, and download the same rows with labels. What is pasted comes first, if both are there.
    A failure gives a message in the panel, never a traceback. `table` holds the last result, None before the first."""

    def __init__(self, classifier: HeadlineClassifier):
        self.classifier, self.table = classifier, None
        self.upload = ipw.FileUpload(
            accept=".csv,.txt",
            multiple=False,
            description="CSV or .txt",
            layout=ipw.Layout(width="auto"),
        )
        self.lines = ipw.Textarea(
            placeholder="or paste one text a line",
            rows=4,
            description="Lines",
            layout=ipw.Layout(width="99%"),
        )
        self.button = ipw.Button(
            description="Classify all",
            button_style="primary",
            tooltip="Classify the lines or the file above",
        )
        self.bar = ipw.IntProgress(
            0, min=0, max=1, layout=ipw.Layout(width="99%", visibility="hidden")
        )
        self.answer = ipw.HTML(layout=ipw.Layout(width="99%"))
        super().__init__(
            [ipw.HBox([self.upload, self.button]), self.lines, self.bar, self.answer],
            layout=ipw.Layout(max_width="720px"),
        )
        self.button.on_click(lambda _: self.run())

    def run(self) -> None:
        """Classify the pasted lines or else the uploaded file, and offer the result."""
        self.table = None
        try:
            self.answer.value = self._answer()
        except KeyboardInterrupt:  # the notebook's stop button
            self.answer.value = "<p>Stopped. Nothing was kept.</p>"
        except Exception as error:  # in a callback, Jupyter would swallow it or show a traceback
            self.answer.value = (
                f"<p>This could not be classified: {escape(str(error) or type(error).__name__)}</p>"
            )
        finally:
            self.bar.layout.visibility = "hidden"

    def _answer(self) -> str:
        name, data = "lines.txt", self.lines.value.encode(errors="replace")
        if not data.strip():
            name, data = _uploaded(self.upload.value)
        if not data.strip():
            return "<p>Upload a file or paste lines first.</p>"
        self.answer.value = f"<p>Classifying {escape(name)} ...</p>"
        # an upper bound of the rows, exact unless a quoted cell holds a line end; the end is shown as the end in any case
        self.bar.value, self.bar.max = 0, max(1, len(split_lines(data, name)))
        self.bar.layout.visibility = "visible"
        start, done, told = time.perf_counter(), 0, 0.0

        def progress(rows: int) -> None:
            nonlocal done, told
            done += rows
            if time.perf_counter() - told > 0.2:  # a message to the browser each
                told, self.bar.value = time.perf_counter(), min(done, self.bar.max)

        table = classify_file(self.classifier, data, name, progress)
        self.table, seconds = table, time.perf_counter() - start
        return _result(
            table,
            table.columns[-len(self.classifier.labels) - 2],
            f"{Path(name).stem}_labels.csv",
            seconds,
        )


def _uploaded(value) -> tuple[str, bytes]:
    """Name and content of a FileUpload's one file; ("", b"") without one. ipywidgets 7 holds files by name, 8 a tuple of them."""
    if not value:
        return "", b""
    if isinstance(value, dict):
        [(name, file)] = value.items()
        return name, bytes(file["content"])
    return value[0]["name"], bytes(value[0]["content"])


def _result(table: pd.DataFrame, label: str, name: str, seconds: float) -> str:
    link = base64.b64encode(
        table.to_csv(index=False, lineterminator="\n").encode(errors="replace")
    ).decode()
    first = table.head(5).map(
        lambda cell: cell[:80] if isinstance(cell, str) else "" if cell != cell else f"{cell:.1%}"
    )
    counts = table[label].value_counts()
    empty = int(counts.pop(NO_TEXT)) if NO_TEXT in counts else 0
    said = (
        ", ".join(f"{count:,} {escape(str(value))}" for value, count in counts.items())
        or "none with a text"
    )
    return (
        f"<p>{len(table):,} rows in {seconds:.1f} s: {said}"
        + f"; {empty:,} without a text" * bool(empty)
        + ".</p>"
        f'<p><a download="{escape(name)}" href="data:text/csv;charset=utf-8;base64,{link}">Download {escape(name)}</a></p>'
        + first.to_html(index=False, border=0).encode(errors="replace").decode()
    )
