import math
import socket

import numpy as np
import pytest
from scipy import stats
from scipy.special import log_softmax, softmax
from sklearn.metrics import f1_score, log_loss

from qlora_helpers.config import LABELS
from qlora_helpers.metrics import (
    fit_temperature,
    macro_f1_interval,
    mcnemar,
    reliability,
    scoreboard,
    scores,
    wilson_interval,
    with_temperature,
)


def test_scores_with_a_label_that_is_never_predicted():
    references = [0, 0, 1, 1, 2, 2, 3, 3]
    predictions = [0, 0, 1, 0, 2, 1, 0, 0]
    f1_world = 2 * 2 / (2 + 5)  # 2 * right / (true + predicted)
    f1_sports = 2 * 1 / (2 + 2)
    f1_business = 2 * 1 / (2 + 1)
    macro_f1 = (f1_world + f1_sports + f1_business + 0) / 4
    assert scores(predictions, references, LABELS) == {"accuracy": 0.5, "macro_f1": pytest.approx(macro_f1)}


def test_macro_f1_counts_a_label_that_is_not_there_at_all():
    assert scores([0, 1, 2], [0, 1, 2], LABELS) == {"accuracy": 1.0, "macro_f1": pytest.approx(3 / 4)}


def test_scores_need_no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the metric went to the network")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert scores([3], [3], LABELS)["accuracy"] == 1.0


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
    table = scoreboard([0, 1, 2, 3], {"majority": [0, 0, 0, 0], "tuned": [0, 1, 2, 3]}, LABELS, {"majority": 7.0})
    assert table.index.tolist() == ["majority", "tuned"]
    low, high = wilson_interval(1, 4)
    f1_low, f1_high = macro_f1_interval([0, 0, 0, 0], [0, 1, 2, 3], LABELS)
    assert table.loc["majority"].to_dict() == pytest.approx(
        {"accuracy": 0.25, "low": low, "high": high, "macro_f1": 0.4 / 4, "f1_low": f1_low, "f1_high": f1_high, "p_value": 0.25,
         "rows_per_second": 7.0, "correct": 1, "rows": 4})
    assert math.isnan(table.p_value["tuned"]) and math.isnan(table.rows_per_second["tuned"])
    assert table.loc["tuned", ["accuracy", "macro_f1", "correct"]].tolist() == [1.0, 1.0, 4]


def drawn(rows: int, accuracy: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    references = rng.integers(0, 4, rows)
    return np.where(rng.random(rows) < accuracy, references, rng.integers(0, 4, rows)), references


@pytest.mark.parametrize("rows", [80, 1000])
def test_the_bootstrap_interval_is_scipys(rows):
    predictions, references = drawn(rows, 0.8)
    expected = stats.bootstrap((predictions, references), lambda p, r: f1_score(r, p, average="macro"), paired=True, vectorized=False,
                               n_resamples=2000, method="percentile", rng=np.random.default_rng(1)).confidence_interval
    found = macro_f1_interval(predictions, references, LABELS)
    assert found == pytest.approx((expected.low, expected.high), abs=0.15 * (expected.high - expected.low))
    assert found == macro_f1_interval(predictions, references, LABELS)


@pytest.mark.parametrize(("wins", "losses", "p_value"), [
    (1, 9, 22 / 1024), (5, 5, 1.0), (0, 0, 1.0), (0, 6, 2 / 64),  # twice the tail of a fair coin
])
def test_mcnemar_counts_only_where_two_systems_differ(wins, losses, p_value):
    references = [0] * (wins + losses + 7)
    one = [0] * wins + [1] * losses + [0] * 4 + [2] * 3
    other = [1] * wins + [0] * losses + [0] * 4 + [3] * 3
    assert mcnemar(one, other, references) == pytest.approx(p_value)
    assert mcnemar(other, one, references) == pytest.approx(p_value)


def test_mcnemar_on_real_counts_is_near_the_chi_square_test():
    """Agresti, Categorical Data Analysis (1990), table 10.1: of the approval ratings 150 and 86 changed; the statistic is 17.36."""
    one, other = [0] * 150 + [1] * 86, [1] * 150 + [0] * 86
    assert mcnemar(one, other, [0] * 236) == pytest.approx(stats.chi2.sf((150 - 86) ** 2 / 236, 1), rel=0.35)
    assert pytest.approx(17.36, abs=0.005) == (150 - 86) ** 2 / 236


def test_reliability_by_hand():
    probabilities = np.array([[0.7, 0.1, 0.1, 0.1], [0.1, 0.68, 0.12, 0.1], [0.95, 0.02, 0.02, 0.01], [0.3, 0.4, 0.2, 0.1]])
    table, error = reliability(probabilities, [0, 0, 0, 1], bins=10)
    assert table.index.tolist() == [4, 7, 10] and table.rows.tolist() == [1, 2, 1]
    assert table.accuracy.tolist() == [1.0, 0.5, 1.0]
    assert error == pytest.approx((1 * 0.6 + 2 * 0.19 + 1 * 0.05) / 4)


def test_probabilities_that_are_true_have_no_calibration_error():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([1, 1, 1, 1], 100_000)
    references = (probabilities.cumsum(axis=1) > rng.random((100_000, 1))).argmax(axis=1)
    assert reliability(probabilities, references)[1] < 0.006


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_the_temperature_that_made_the_probabilities_is_found_and_undone(temperature):
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(50_000, 4)) * 2
    references = (softmax(logits, axis=1).cumsum(axis=1) > rng.random((50_000, 1))).argmax(axis=1)
    confident = softmax(logits * temperature, axis=1)
    found = fit_temperature(confident, references)
    assert found == pytest.approx(temperature, rel=0.03)
    np.testing.assert_allclose(with_temperature(confident, temperature), softmax(logits, axis=1), atol=1e-12)
    assert reliability(with_temperature(confident, found), references)[1] < 0.01
    grid = np.linspace(0.5, 1.5, 41) * found
    losses = [log_loss(references, softmax(np.log(confident) / t, axis=1)) for t in grid]
    assert grid[np.argmin(losses)] == pytest.approx(found, rel=0.02)


def test_few_rows_that_are_all_right_do_not_ask_for_certainty():
    """Without the prior they would get the least temperature that is allowed; hundreds of rows are believed."""
    sure = np.array([[0.95, 0.03, 0.01, 0.01]])
    assert 0.6 < fit_temperature(sure.repeat(40, axis=0), [0] * 40) < 0.75
    assert fit_temperature(sure.repeat(4000, axis=0), [0] * 4000) < 0.5


def test_temperature_of_certain_rows_is_finite():
    probabilities = np.array([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [1.0, 0, 0, 0]])
    for references in ([0, 1, 0], [0, 1, 2]):
        found = fit_temperature(probabilities, references)
        assert 0.25 <= found <= 10
        assert np.isfinite(log_softmax(with_temperature(probabilities, found), axis=1)).all()
        np.testing.assert_allclose(with_temperature(probabilities, found).sum(axis=1), 1)
