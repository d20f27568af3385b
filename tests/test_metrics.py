import math
import socket

import pytest

from qlora_helpers.metrics import scoreboard, scores, wilson_interval


def test_scores_with_a_label_that_is_never_predicted():
    references = [0, 0, 1, 1, 2, 2, 3, 3]
    predictions = [0, 0, 1, 0, 2, 1, 0, 0]
    f1_world = 2 * 2 / (2 + 5)  # 2 * right / (true + predicted)
    f1_sports = 2 * 1 / (2 + 2)
    f1_business = 2 * 1 / (2 + 1)
    assert scores(predictions, references) == {"accuracy": 0.5, "macro_f1": pytest.approx((f1_world + f1_sports + f1_business + 0) / 4)}


def test_macro_f1_counts_a_label_that_is_not_there_at_all():
    assert scores([0, 1, 2], [0, 1, 2]) == {"accuracy": 1.0, "macro_f1": pytest.approx(3 / 4)}


def test_scores_need_no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the metric went to the network")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert scores([3], [3])["accuracy"] == 1.0


@pytest.mark.parametrize(("correct", "total", "low", "high"), [
    (81, 263, .2553, .3662), (15, 148, .0624, .1605), (0, 20, .0000, .1611), (1, 29, .0061, .1718),
])
def test_wilson_interval_as_published(correct, total, low, high):
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_against_the_closed_formula():
    z, n, p = 1.959963984540054, 80, 68 / 80
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert wilson_interval(68, 80) == pytest.approx(((centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)), abs=1e-12)


def test_the_scoreboard_has_a_row_for_each_system():
    table = scoreboard([0, 1, 2, 3], {"majority": [0, 0, 0, 0], "tuned": [0, 1, 2, 3]})
    assert table.index.tolist() == ["majority", "tuned"]
    low, high = wilson_interval(1, 4)
    assert table.loc["majority"].to_dict() == pytest.approx(
        {"accuracy": 0.25, "low": low, "high": high, "macro_f1": 0.4 / 4, "correct": 1, "rows": 4})
    assert table.loc["tuned", ["accuracy", "macro_f1", "correct"]].tolist() == [1.0, 1.0, 4]
