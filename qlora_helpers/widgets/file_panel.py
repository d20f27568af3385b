"""The file panel of 05, of core ipywidgets that work in 7.7 (Colab) and 8.1."""

import base64
import time
from pathlib import Path

import ipywidgets as ipw
import pandas as pd

from qlora_helpers.classifier import (
    NO_TEXT,
    HeadlineClassifier,
    classify_file,
    split_lines,
    write_csv,
)
from qlora_helpers.texts import printable
from qlora_helpers.widgets.markup import escape, failure


class FilePanel(ipw.VBox):
    """Upload a CSV or .txt file, or paste lines, and download the same rows with labels.

    Pasted lines come before an uploaded file. A failure gives a message in the panel, never a
    traceback. `table` is the last result, None without one.
    """

    def __init__(self, classifier: HeadlineClassifier):
        self.classifier, self.table = classifier, None
        wide = {"width": "99%"}
        self.upload = ipw.FileUpload(
            accept=".csv,.txt", multiple=False, description="CSV or .txt", layout={"width": "auto"}
        )
        self.lines = ipw.Textarea(
            placeholder="or paste one text a line", rows=4, description="Lines", layout=wide
        )
        self.button = ipw.Button(description="Classify all", button_style="primary")
        self.bar = ipw.IntProgress(0, min=0, max=1, layout=wide | {"visibility": "hidden"})
        self.answer = ipw.HTML(layout=wide)
        children = [ipw.HBox([self.upload, self.button]), self.lines, self.bar, self.answer]
        super().__init__(children, layout={"max_width": "720px"})
        self.button.on_click(lambda _: self.run())

    def run(self) -> None:
        """Classify the pasted lines or else the uploaded file, and offer the result."""
        self.table = None
        try:
            self.answer.value = self._answer()
        except KeyboardInterrupt:  # the notebook's stop button
            self.answer.value = "<p>Stopped. Nothing was kept.</p>"
        except Exception as error:  # Jupyter would hide it, or show a traceback
            self.answer.value = failure(error)
        finally:
            self.bar.layout.visibility = "hidden"

    def _answer(self) -> str:
        name, data = "lines.txt", printable(self.lines.value).encode()
        if not data.strip():
            name, data = _uploaded(self.upload.value)
        if not data.strip():
            return "<p>Upload a file or paste lines first.</p>"
        self.answer.value = f"<p>Classifying {escape(name)} ...</p>"
        # A quoted cell may hold a line end: there are at most as many rows as lines.
        self.bar.value, self.bar.max = 0, max(1, len(split_lines(data, name)))
        self.bar.layout.visibility = "visible"

        def progress(rows: int) -> None:
            self.bar.value = min(self.bar.value + rows, self.bar.max)

        start = time.perf_counter()
        self.table = classify_file(self.classifier, data, name, progress)
        seconds = time.perf_counter() - start
        label = self.table.columns[-len(self.classifier.labels) - 2]
        return _result(self.table, label, f"{Path(name).stem}_labels.csv", seconds)


def _uploaded(value) -> tuple[str, bytes]:
    """Return name and content of a FileUpload's one file; ("", b"") without one."""
    # ipywidgets 7 has a dictionary of files by name, 8 a tuple of files.
    files = value.items() if isinstance(value, dict) else [(file["name"], file) for file in value]
    return next(((name, bytes(file["content"])) for name, file in files), ("", b""))


def _result(table: pd.DataFrame, label: str, name: str, seconds: float) -> str:
    """Return HTML with the number of rows of each label, a link to the CSV, and its first rows."""
    encoded = base64.b64encode(write_csv(table)).decode()
    link = f"data:text/csv;charset=utf-8;base64,{encoded}"
    counts = table[label].replace(NO_TEXT, "without a text").value_counts()
    counted = ", ".join(f"{count:,} {escape(value)}" for value, count in counts.items())
    first = table.head(5).map(lambda cell: cell[:80] if isinstance(cell, str) else f"{cell:.1%}")
    return (
        f"<p>{len(table):,} rows in {seconds:.1f} s: {counted}.</p>"
        f'<p><a download="{escape(name)}" href="{link}">Download {escape(name)}</a>. A \' in '
        "it keeps a spreadsheet from taking a text for a formula.</p>"
        + printable(first.to_html(index=False, border=0))
    )
