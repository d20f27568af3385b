"""The headline panel of 05, of core ipywidgets that work in 7.7 (Colab) and 8.1."""

import time
from collections import deque
from collections.abc import Sequence

import ipywidgets as ipw
import numpy as np

from qlora_helpers.classifier import MOST_WORDS, HeadlineClassifier
from qlora_helpers.plots import label_colours
from qlora_helpers.texts import tidy_text
from qlora_helpers.widgets.markup import escape, failure

EXAMPLES = (
    "Chip maker warns that profit will miss forecasts",
    "Peace talks resume after border clashes",
    "Striker signs record contract",
)
_HISTORY = 20
# Characters of a text that are shown. All of it is classified, up to the model's max_length.
_SHOWN = 300


class HeadlinePanel(ipw.VBox):
    """A text area, examples to click, and the label probabilities of the last text.

    The button classifies, and so does Enter at the end of the text. A failure gives a message in
    the panel, never a traceback. `probabilities` holds the bars' values, None without any; `asked`
    is the history: text, label and probability, the newest first.
    """

    def __init__(self, classifier: HeadlineClassifier, examples: Sequence[str] = ()):
        self.classifier, self.probabilities = classifier, None
        self.asked = deque(maxlen=_HISTORY)
        # The rest is margin: with 100% a scrollbar would show.
        wide, narrow = {"width": "99%"}, {"width": "auto"}
        self.text = ipw.Textarea(rows=3, description="Headline", layout=wide)
        self.text.placeholder = "Type a headline and press Enter"
        self.button = ipw.Button(description="Classify", button_style="primary")
        self.base_model = ipw.Checkbox(description="beside the base model", indent=False)
        self.words = ipw.Checkbox(description="which words mattered", indent=False)
        self.base_model.layout = self.words.layout = narrow
        self.examples = [ipw.Button(description=text, layout=narrow) for text in examples]
        self.answer, self.history = ipw.HTML(layout=wide), ipw.HTML(layout=wide)
        row = ipw.HBox([self.button, self.base_model, self.words])
        row.layout.flex_flow = "row wrap"
        children = [self.text, row, ipw.VBox(self.examples), self.answer, self.history]
        super().__init__(children, layout={"max_width": "720px"})
        self.text.observe(self._typed, names="value")
        self.button.on_click(lambda _: self.run())
        for control in (self.base_model, self.words):
            control.observe(lambda change: self.run(), names="value")
        for example, text in zip(self.examples, examples, strict=True):
            example.on_click(lambda _, text=text: self._enter(text))
        if examples:
            self._enter(examples[0])

    def _typed(self, change) -> None:
        # A text area tells its content, not the keys: Enter leaves a line end at the end.
        if change["new"].endswith("\n"):
            self._enter(change["new"].rstrip("\n"))

    def _enter(self, text: str) -> None:
        self.text.value = text
        self.run()

    def run(self) -> None:
        """Classify the text area's value and show the bars."""
        self.probabilities = None
        try:
            self.answer.value = self._answer(self.text.value)
        except Exception as error:  # Jupyter would hide it, or show a traceback
            self.answer.value = failure(error)

    def _answer(self, text: str) -> str:
        start, labels = time.perf_counter(), self.classifier.labels
        tuned = self.classifier.probabilities([text])[0]
        if np.isnan(tuned).any():
            return "<p>Type a headline first.</p>"
        seconds = time.perf_counter() - start
        label, shown = labels[int(tuned.argmax())], _shorten(tidy_text(text))
        answer = f"<b>{escape(label)}</b> in {seconds:.2f} s: <bdi>{escape(shown)}</bdi>"
        bars = _bars(labels, tuned)
        if self.base_model.value:
            base = self.classifier.probabilities([text], base_model=True)[0]
            bars = f"<p><b>tuned model</b></p>{bars}<p><b>base model</b></p>{_bars(labels, base)}"
        answer += bars
        if self.words.value:
            answer += self._words(text, label)
        self.probabilities = tuned
        # A box that was ticked asks for the same text again.
        if not self.asked or self.asked[0][0] != shown:
            self.asked.appendleft((shown, label, tuned.max()))
            self.history.value = "<p><b>Asked so far</b>, newest first:</p>" + "".join(
                f"<div>{escape(label)} {p:.0%} <bdi>{escape(text)}</bdi></div>"
                for text, label, p in self.asked
            )
        return answer

    def _words(self, text: str, label: str) -> str:
        effects = self.classifier.word_effects(text)
        if effects.empty:
            return "<p>One word alone: there is nothing to leave out.</p>"
        strongest = max(effects.effect.abs().max(), 0.1)
        words = []
        for word, effect in zip(effects.word, effects.effect, strict=True):
            colour = "0,114,178" if effect >= 0 else "213,94,0"
            background = f"rgba({colour},{0.6 * abs(effect) / strongest:.2f})"
            words.append(
                f'<span style="background:{background};padding:0 2px">'
                f"<bdi>{escape(_shorten(word))}</bdi> <small>{effect:+.1f}</small></span>"
            )
        return (
            f"<p>Which words spoke for {escape(label)} (+) or against it (−): by how much the "
            "natural logarithm of its odds against all other labels falls without the word. +1 "
            "means odds 2.7 times as high with the word, +2 means 7.4 times. The first "
            f"{MOST_WORDS} words at most.</p><p>{' '.join(words)}</p>"
        )


def _bars(labels: Sequence[str], probabilities: np.ndarray) -> str:
    width = 1 + 0.6 * max(map(len, labels))
    return "".join(
        '<div style="display:flex;align-items:center;margin:3px 0">'
        f'<span style="width:{width}em">{escape(label)}</span>'
        '<span style="flex:1;background:#eee">'
        f'<span style="display:block;width:{p:.1%};height:16px;background:{colour}"></span></span>'
        f'<span style="width:60px;text-align:right">{p:.1%}</span></div>'
        for label, colour, p in zip(labels, label_colours(labels), probabilities, strict=True)
    )


def _shorten(text: str) -> str:
    if len(text) <= _SHOWN:
        return text
    return f"{text[:_SHOWN]} ... ({len(text):,} characters)"
