"""The figures hold the data they were given."""

import io

import matplotlib.pyplot as plt
import numpy as np
import pytest

from qlora_helpers import LABELS, plots, reliability, scoreboard

HISTORY = {
    "train": [
        {"step": 5, "seconds": 30.0, "epoch": 0.5, "loss": 1.5},
        {"step": 10, "seconds": 60.0, "epoch": 1.0, "loss": 0.9},
        {"step": 20, "seconds": 150.0, "epoch": 2.0, "loss": 0.4},
    ],
    "validation": [
        {"step": 0, "seconds": 3.0, "epoch": 0, "loss": 2.0, "accuracy": 0.4, "macro_f1": 0.3},
        {"step": 10, "seconds": 66.0, "epoch": 1.0, "loss": 0.8, "accuracy": 0.7, "macro_f1": 0.7},
        {"step": 20, "seconds": 156.0, "epoch": 2.0, "loss": 0.9, "accuracy": 0.6, "macro_f1": 0.5},
    ],
    "best_epoch": 1.0,
    "label_words": [" A", " B", " C", " D"],
}


def lines(ax) -> dict[str, list[list[float]]]:
    return {line.get_label(): line.get_xydata().tolist() for line in ax.lines}


def test_loss_curves():
    left, right = plots.loss_curves(HISTORY, smoothing=0).axes
    assert lines(left)["training loss"] == [[0.5, 1.5], [1.0, 0.9], [2.0, 0.4]]
    assert lines(left)["validation loss"] == [[0, 2.0], [1.0, 0.8], [2.0, 0.9]]
    assert lines(left)["kept: epoch 1"] == [[1, 0], [1, 1]]
    assert lines(right)["validation accuracy"] == [[0, 0.4], [1.0, 0.7], [2.0, 0.6]]
    assert plt.get_fignums() == []  # else Jupyter would show it twice


def test_loss_curves_over_steps_and_minutes_smoothed_logarithmic_and_beside_another_run():
    left, _ = plots.loss_curves(HISTORY, x="steps").axes
    second, third = (0.4 * 0.9 + 0.24 * 1.5) / 0.64, (0.16 + 0.24 * 0.9 + 0.144 * 1.5) / 0.784
    smoothed = np.array(lines(left)["training loss, smoothed by 0.6"])
    assert smoothed == pytest.approx(np.array([[5, 1.5], [10, second], [20, third]]))
    assert lines(left)["kept: epoch 1"] == [[10, 0], [10, 1]]
    earlier = {"before": HISTORY | {"best_epoch": 2.0}}
    left, right = plots.loss_curves(HISTORY, x="minutes", log=True, earlier=earlier).axes
    assert left.get_yscale() == "log"
    assert lines(left)["validation loss"] == [[0.05, 2.0], [1.1, 0.8], [2.6, 0.9]]
    for ax, score in ((left, "validation loss"), (right, "validation accuracy")):
        assert lines(ax)["validation, before"] == lines(ax)[score]


def test_loss_curves_of_a_training_that_has_just_begun():
    for validation in ([], HISTORY["validation"][:1]):
        begun = HISTORY | {"train": [], "validation": validation, "best_epoch": None}
        left, _ = plots.loss_curves(begun).axes
        assert lines(left)["validation loss"] == [[0, 2.0]][: len(validation)]


def test_scoreboard_bars():
    table = scoreboard([0, 1, 2, 3], {"one": [0, 0, 0, 0], "two": [0, 1, 2, 0]}, LABELS)
    (ax,) = plots.scoreboard_bars(table).axes
    assert [bar.get_width() for bar in ax.patches] == [0.75, 0.25]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["two", "one"]


def test_probability_bars():
    (ax,) = plots.probability_bars("A $5 headline", np.array([0.1, 0.2, 0.3, 0.4]), LABELS).axes
    assert [label.get_text() for label in ax.get_yticklabels()] == list(LABELS[::-1])
    assert [bar.get_width() for bar in ax.patches] == [0.4, 0.3, 0.2, 0.1]


def test_dollars_of_a_reader_are_shown_as_they_are():
    """Between two of them, matplotlib would read a formula, and fail when it draws a broken one."""
    labels = ("$a_{b$", "costs $5", r"\$^$")
    bars = plots.probability_bars("$x^$ at $5", np.array([0.2, 0.3, 0.5]), labels)
    for figure in (bars, plots.loss_curves(HISTORY, earlier={"$_$": HISTORY})):
        figure.savefig(io.BytesIO())


def test_reliability_diagram():
    table, _ = reliability(np.array([[0.7, 0.3, 0, 0], [0.95, 0.05, 0, 0]]), [0, 1])
    (ax,) = plots.reliability_diagram({"as trained": table}).axes
    assert ax.collections[0].get_offsets().tolist() == [[0.7, 1.0], [0.95, 0.0]]
