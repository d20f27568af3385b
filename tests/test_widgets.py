"""The headline panel, driven through its widgets with the embedded model."""

import re

import numpy as np
import pytest

from qlora_helpers import LABELS, HeadlinePanel, label_probabilities

EXAMPLES = ["Striker signs record contract", "Central bank raises rates"]


@pytest.fixture
def panel(base):
    return HeadlinePanel(lambda texts: label_probabilities(*base, texts, 256), EXAMPLES)


def shown(panel) -> list[float]:
    """The percentages that the panel shows, in the order of the bars."""
    return [float(number) for number in re.findall(r">([\d.]+)%<", panel.answer.value)]


def test_starts_with_the_first_example_classified(panel, base):
    assert panel.text.value == EXAMPLES[0]
    np.testing.assert_allclose(panel.probabilities, label_probabilities(*base, EXAMPLES[:1], 256)[0], atol=1e-6)
    assert f"<b>{LABELS[panel.probabilities.argmax()]}</b>" in panel.answer.value


def test_shows_a_bar_for_each_label_and_they_sum_to_one(panel):
    assert sum(panel.probabilities) == pytest.approx(1, abs=1e-9)
    assert shown(panel) == [round(100 * p, 1) for p in panel.probabilities]
    assert re.findall(r"width:80px\">([^<]+)<", panel.answer.value) == LABELS


def test_enter_button_and_examples_classify(panel):
    first = panel.probabilities
    panel.text.value = "A new phone with two cameras goes on sale"  # what Enter does
    second = panel.probabilities
    assert not np.allclose(first, second)
    panel.examples[1].click()
    assert panel.text.value == EXAMPLES[1]
    assert not np.allclose(second, panel.probabilities)
    panel.probabilities = None
    panel.button.click()
    assert panel.probabilities is not None


def test_empty_text_asks_for_one(panel):
    panel.text.value = "  \n "
    assert panel.answer.value == "<p>Type a headline first.</p>"


def test_markup_is_shown_and_never_run(panel):
    panel.text.value = "Profit & <script>alert(1)</script> \"loss\" 3 < 5"
    assert "<script>" not in panel.answer.value
    assert "Profit &amp; alert(1) &quot;loss&quot; 3 &lt; 5" in panel.answer.value


def test_a_failure_is_told_in_the_panel():
    def fail(texts):
        raise RuntimeError("out of <memory>")

    panel = HeadlinePanel(fail, EXAMPLES)
    assert panel.answer.value == "<p>This could not be classified: out of &lt;memory&gt;</p>"
    assert panel.probabilities is None
