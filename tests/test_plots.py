"""The figures hold the data they were given."""

import matplotlib.pyplot as plt
import numpy as np

from qlora_helpers import LABELS, plots, scoreboard

HISTORY = {
    "train": [{"epoch": 0.5, "loss": 1.5}, {"epoch": 1.0, "loss": 0.9}, {"epoch": 2.0, "loss": 0.4}],
    "validation": [{"epoch": 0, "loss": 2.0, "accuracy": 0.4, "macro_f1": 0.3},
                   {"epoch": 1.0, "loss": 0.8, "accuracy": 0.7, "macro_f1": 0.7},
                   {"epoch": 2.0, "loss": 0.9, "accuracy": 0.6, "macro_f1": 0.5}],
    "best_epoch": 1.0,
}


def test_loss_curves():
    left, right = plots.loss_curves(HISTORY).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in left.lines}
    assert lines["training loss"] == [[0.5, 1.5], [1.0, 0.9], [2.0, 0.4]]
    assert lines["validation loss"] == [[0, 2.0], [1.0, 0.8], [2.0, 0.9]]
    assert lines["kept: epoch 1"] == [[1, 0], [1, 1]]
    assert right.lines[0].get_ydata().tolist() == [0.4, 0.7, 0.6]


def test_scoreboard_bars():
    table = scoreboard([0, 1, 2, 3], {"one": [0, 0, 0, 0], "two": [0, 1, 2, 0]})
    (ax,) = plots.scoreboard_bars(table).axes
    bars = [bar.get_width() for bar in ax.patches]
    assert bars == [0.75, 0.25]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["two", "one"]


def test_probability_bars():
    (ax,) = plots.probability_bars("A $5 headline", np.array([0.1, 0.2, 0.3, 0.4])).axes
    assert [label.get_text() for label in ax.get_yticklabels()] == LABELS[::-1]
    assert [bar.get_width() for bar in ax.patches] == [0.4, 0.3, 0.2, 0.1]


def test_figures_are_closed_so_that_jupyter_shows_them_once():
    plots.loss_curves(HISTORY)
    assert plt.get_fignums() == []
