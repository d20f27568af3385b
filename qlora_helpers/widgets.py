"""The headline panel of 05: type a headline, read a bar for each label. Core ipywidgets alone."""

import html
import time
from collections.abc import Callable

import ipywidgets as ipw
import numpy as np

from qlora_helpers.data import LABELS, clean_text
from qlora_helpers.plots import COLOURS


class HeadlinePanel(ipw.VBox):
    """A text field, examples to click, and the label probabilities of what was entered last.
    `classify` maps a list of texts to (texts, labels) probabilities. Enter or the button classifies; an empty text or a
    failure gives a message in the panel, never a traceback. `probabilities` holds the bars' values, None before the first."""

    def __init__(self, classify: Callable[[list[str]], np.ndarray], examples: list[str]):
        self.classify, self.probabilities = classify, None
        self.text = ipw.Text(placeholder="Type a headline and press Enter", continuous_update=False,
                             layout=ipw.Layout(width="100%"), description="Headline")
        self.button = ipw.Button(description="Classify", button_style="primary")
        self.examples = [ipw.Button(description=text, tooltip="Classify this", layout=ipw.Layout(width="auto")) for text in examples]
        self.answer = ipw.HTML()
        super().__init__([self.text, ipw.HBox([self.button]), ipw.VBox(self.examples), self.answer], layout=ipw.Layout(max_width="720px"))
        self.text.observe(lambda change: self.run(), names="value")
        self.button.on_click(lambda _: self.run())
        for example in self.examples:
            example.on_click(lambda clicked: self._enter(clicked.description))
        self._enter(examples[0])

    def _enter(self, text: str) -> None:
        if self.text.value == text:
            self.run()
        self.text.value = text

    def run(self) -> None:
        """Classify the text field's value and show the bars."""
        text = clean_text(self.text.value)
        if not text:
            self.answer.value = "<p>Type a headline first.</p>"
            return
        start = time.perf_counter()
        try:
            self.probabilities = self.classify([text])[0]
        except Exception as error:  # in a callback, Jupyter would swallow it
            self.answer.value = f"<p>This could not be classified: {html.escape(str(error))}</p>"
            return
        bars = "".join(
            f'<div style="display:flex;align-items:center;margin:3px 0"><span style="width:80px">{label}</span>'
            f'<span style="flex:1;background:#eee"><span style="display:block;width:{p:.1%};height:16px;background:{COLOURS[label]}">'
            f'</span></span><span style="width:60px;text-align:right">{p:.1%}</span></div>'
            for label, p in zip(LABELS, self.probabilities, strict=True))
        best = LABELS[int(np.argmax(self.probabilities))]
        self.answer.value = f"<b>{best}</b> in {time.perf_counter() - start:.2f} s: {html.escape(text)}{bars}"
