"""The panels, driven through their widgets: headlines with the embedded model, losses with histories on disk."""

import io
import json
import re
import time

import numpy as np
import pytest
from matplotlib.image import imread

from qlora_helpers import LABELS, ErrorExplorer, HeadlinePanel, LossPanel, RunConfig, Workspace, label_probabilities, review_table
from qlora_helpers.config import PROFILES

CONFIG = RunConfig(profile="cpu", **PROFILES["cpu"])
EXAMPLES = ["Striker signs record contract", "Central bank raises rates"]


@pytest.fixture
def panel(base):
    return HeadlinePanel(lambda texts: label_probabilities(*base, texts, CONFIG), EXAMPLES, LABELS)


def shown(panel) -> list[float]:
    """The percentages that the panel shows, in the order of the bars."""
    return [float(number) for number in re.findall(r">([\d.]+)%<", panel.answer.value)]


def test_starts_with_the_first_example_classified(panel, base):
    assert panel.text.value == EXAMPLES[0]
    np.testing.assert_allclose(panel.probabilities, label_probabilities(*base, EXAMPLES[:1], CONFIG)[0], atol=1e-6)
    assert f"<b>{LABELS[panel.probabilities.argmax()]}</b>" in panel.answer.value


def test_shows_a_bar_for_each_label_and_they_sum_to_one(panel):
    assert sum(panel.probabilities) == pytest.approx(1, abs=1e-9)
    assert shown(panel) == [round(100 * p, 1) for p in panel.probabilities]
    assert re.findall(r"width:[\d.]+em\">([^<]+)<", panel.answer.value) == list(LABELS)


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

    panel = HeadlinePanel(fail, EXAMPLES, LABELS)
    assert panel.answer.value == "<p>This could not be classified: out of &lt;memory&gt;</p>"
    assert panel.probabilities is None


def test_the_error_explorer_shows_a_cell_of_the_confusion_matrix():
    texts = ["one", "two <b>", "three", "four", "five", "six"]
    probabilities = np.array([[.9, .1, 0, 0], [.2, .7, .1, 0], [0, .8, .2, 0], [.3, .6, .1, 0], [0, 0, 1, 0], [.6, 0, .4, 0]])
    table = review_table(texts, [0, 0, 0, 1, 2, 2], probabilities, LABELS)
    assert table.text.tolist() == ["five", "one", "three", "two <b>", "four", "six"]
    explorer = ErrorExplorer(table, LABELS, rows=2)
    assert (explorer.true.value, explorer.predicted.value) == ("World", "Sports")  # where most errors are
    assert explorer.shown.text.tolist() == ["three", "two <b>"]
    assert "2 of 6 rows" in explorer.answer.value and "70.0%" in explorer.answer.value and "two &lt;b&gt;" in explorer.answer.value
    explorer.true.value = "Business"
    assert explorer.shown.empty and "0 of 6 rows" in explorer.answer.value
    explorer.predicted.value = "World"
    assert explorer.shown.text.tolist() == ["six"]
    without_errors = ErrorExplorer(review_table(["one"], [0], probabilities[:1], LABELS), LABELS)
    assert without_errors.shown.text.tolist() == ["one"]


def history(losses: list[float]) -> dict:
    return {"train": [{"step": i + 1, "seconds": 60.0 * i, "epoch": (i + 1) / 2, "loss": loss} for i, loss in enumerate(losses)],
            "validation": [{"step": 2 * i, "seconds": 120.0 * i, "epoch": float(i), "loss": 2 - i, "accuracy": i / 2, "macro_f1": i / 3}
                           for i in range(2)],
            "label_words": [" A", " B"], "best_epoch": 1.0, "seconds": 120.0, "rows_per_second": 2.5}


@pytest.fixture
def losses(tmp_path):
    for name, values in (("training.json", [2.0, 0.5]), ("earlier/03-one/training.json", [2.0, 1.0])):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(history(values)))
    return LossPanel(Workspace(tmp_path))


def test_the_loss_panel_reads_a_finished_training_and_redraws_at_each_control(losses):
    losses.load()
    assert losses.status.value == "2.0 minutes, 2.50 rows/s"
    assert losses.earlier.options == ("03-one",) and losses.earlier in losses.children
    pictures = [losses.picture.value]
    for control, value in ((losses.smoothing, 0.0), (losses.x, "minutes"), (losses.x, "steps"), (losses.log_scale, True),
                           (losses.earlier, ("03-one",))):
        control.value = value
        pictures.append(losses.picture.value)
    assert len(set(pictures)) == 6
    assert {imread(io.BytesIO(picture)).shape[2] for picture in pictures} == {4}


def test_the_loss_panel_takes_less_than_a_fiftieth_of_the_time(losses):
    drawn = set()
    start = time.perf_counter()
    losses._start = start - 60  # a minute of training has gone by
    while time.perf_counter() - start < 2:
        losses.live(lambda: history([2.0, 0.5 + 0.001 * len(drawn)]), "step 1 of <2>")
        drawn.add(losses.picture.value)
        time.sleep(0.01)
    assert len(drawn) >= 2 and losses.cost < 0.02 * 62 + losses._last
    assert losses.status.value == "step 1 of &lt;2&gt;"
    losses._start = time.perf_counter()
    before = losses.picture.value
    losses.live(lambda: history([2.0, 0.1]), "too soon")
    assert losses.picture.value == before and losses.status.value == "too soon"
