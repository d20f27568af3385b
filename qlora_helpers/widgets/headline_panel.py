"""The headline panel of 05: type a text, see its labels. Core ipywidgets alone, which work in 7.7 (Colab) and 8.1."""

import time
from collections import deque
from collections.abc import Sequence

import ipywidgets as ipw
import numpy as np

from qlora_helpers.classifier import MOST_WORDS, HeadlineClassifier
from qlora_helpers.plots import label_colours
from qlora_helpers.texts import tidy_text
from qlora_helpers.widgets.markup import escape

EXAMPLES = (
    "Chip maker warns that profit will miss forecasts",
    "Peace talks resume after border clashes",
    "Striker signs record contract",
)
_HISTORY = 20
_SHOWN = 300  # characters of a text; all of it is classified, up to the model's max_length


class HeadlinePanel(ipw.VBox):
    """A text area, examples to click, and the label probabilities of what was entered last; the base model's beside them, and what each
    word did, on request. The button classifies, and so does Enter at the end of the text. An empty text or a failure gives a
    message in the panel, never a traceback. It starts with the first example, if any. `probabilities` holds the bars' values, None if
    there are none; `asked` the history."""

    def __init__(self, classifier: HeadlineClassifier, examples: Sequence[str] = ()):
        self.classifier, self.probabilities, self.asked, self._shown = (
            classifier,
            None,
            deque(maxlen=_HISTORY),
            "",
        )
        wide = ipw.Layout(
            width="99%"
        )  # the rest is its margin: a whole width would bring a scrollbar
        self.text = ipw.Textarea(
            placeholder="Type a headline and press Enter",
            rows=3,
            layout=wide,
            description="Headline",
        )
        self.button = ipw.Button(
            description="Classify", button_style="primary", tooltip="Classify the text above"
        )
        self.base_model = ipw.Checkbox(
            False,
            description="beside the base model",
            indent=False,
            layout=ipw.Layout(width="auto"),
        )
        self.words = ipw.Checkbox(
            False, description="which words mattered", indent=False, layout=ipw.Layout(width="auto")
        )
        self.examples = [
            ipw.Button(description=text, tooltip="Classify this", layout=ipw.Layout(width="auto"))
            for text in examples
        ]
        self.answer, self.history = ipw.HTML(layout=wide), ipw.HTML(layout=wide)
        super().__init__(
            [
                self.text,
                ipw.HBox(
                    [self.button, self.base_model, self.words],
                    layout=ipw.Layout(flex_flow="row wrap"),
                ),
                ipw.VBox(self.examples),
                self.answer,
                self.history,
            ],
            layout=ipw.Layout(max_width="720px"),
        )
        self.text.observe(self._typed, names="value")
        self.button.on_click(lambda _: self.run())
        for control in (self.base_model, self.words):
            control.observe(lambda change: self.run(), names="value")
        for example, text in zip(self.examples, examples, strict=True):
            example.on_click(lambda _, text=text: self._enter(text))
        if examples:
            self._enter(examples[0])

    def _typed(self, change) -> None:
        # a text area tells of what is in it, not of keys: a line end after its last character is what Enter leaves
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
        except Exception as error:  # in a callback, Jupyter would swallow it or show a traceback
            self.answer.value = (
                f"<p>This could not be classified: {escape(str(error) or type(error).__name__)}</p>"
            )

    def _answer(self, text: str) -> str:
        start = time.perf_counter()
        found = self.classifier.probabilities([text])[0]
        if np.isnan(found).any():
            return "<p>Type a headline first.</p>"
        seconds, labels = time.perf_counter() - start, self.classifier.labels
        best, shown = labels[int(found.argmax())], _shorten(tidy_text(text))
        parts = [f"<b>{escape(best)}</b> in {seconds:.2f} s: <bdi>{escape(shown)}</bdi>"]
        if self.base_model.value:
            base = self.classifier.probabilities([text], base_model=True)[0]
            parts += [
                "<p><b>tuned model</b></p>",
                _bars(labels, found),
                "<p><b>base model</b></p>",
                _bars(labels, base),
            ]
        else:
            parts.append(_bars(labels, found))
        if self.words.value:
            parts.append(self._words(text, best))
        self.probabilities = found
        if not self.asked or self.asked[0][0] != shown:  # not again for a box that was ticked
            self.asked.appendleft((shown, best, found.max()))
            lines = "".join(
                f"<tr><td style='padding-right:1em'>{escape(label)}</td><td style='padding-right:1em'>{p:.0%}</td>"
                f"<td><bdi>{escape(text)}</bdi></td></tr>"
                for text, label, p in self.asked
            )
            self.history.value = f"<p><b>Asked so far</b>, newest first</p><table style='text-align:left'>{lines}</table>"
        return "".join(parts)

    def _words(self, text: str, best: str) -> str:
        effects = self.classifier.word_effects(text)
        if effects.empty:
            return "<p>One word alone: there is nothing to leave out.</p>"
        most = max(effects.effect.abs().max(), 0.1)
        colours = {True: "0,114,178", False: "213,94,0"}
        words = " ".join(
            f'<span style="background:rgba({colours[e >= 0]},{0.6 * abs(e) / most:.2f});padding:0 2px"><bdi>'
            f"{escape(_shorten(word))}</bdi> <small>{e:+.1f}</small></span>"
            for word, e in zip(effects.word, effects.effect, strict=True)
        )
        many = len(tidy_text(text).split()) > MOST_WORDS
        first = f" The first {MOST_WORDS} words." if many else ""
        return (
            f"<p>Which words spoke for {escape(best)} (+) or against it (−): by how much the "
            "natural logarithm of its odds against all other labels falls without the word. +1 "
            "means odds 2.7 times as high with the word, +2 means 7.4 times."
            f"{first}</p><p>{words}</p>"
        )


def _bars(labels: Sequence[str], probabilities: np.ndarray) -> str:
    width = 1 + 0.6 * max(map(len, labels))
    return "".join(
        f'<div style="display:flex;align-items:center;margin:3px 0"><span style="width:{width}em">{escape(label)}</span>'
        f'<span style="flex:1;background:#eee"><span style="display:block;width:{p:.1%};height:16px;background:{colour}">'
        f'</span></span><span style="width:60px;text-align:right">{p:.1%}</span></div>'
        for label, colour, p in zip(labels, label_colours(labels), probabilities, strict=True)
    )


def _shorten(text: str) -> str:
    return text if len(text) <= _SHOWN else text[:_SHOWN] + f" ... ({len(text):,} characters)"
