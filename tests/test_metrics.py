import math
import re
import socket

import numpy as np
import pytest
from scipy.special import softmax

from qlora_helpers.config import LABELS
from qlora_helpers.metrics import (
    ece_by_chance,
    fit_temperature,
    macro_f1_interval,
    mcnemar,
    p_text,
    reliability,
    scoreboard,
    scores,
    wilson_interval,
    with_temperature,
)


@pytest.mark.parametrize(
    ("predictions", "references", "accuracy", "f1"),
    [
        # 2 * right / (true + predicted) of each label: one is never predicted
        ([0, 0, 1, 0, 2, 1, 0, 0], [0, 0, 1, 1, 2, 2, 3, 3], 0.5, [4 / 7, 2 / 4, 2 / 3, 0]),
        ([0, 1, 2], [0, 1, 2], 1.0, [1, 1, 1, 0]),  # one is not there at all
    ],
)
def test_scores_need_no_network(monkeypatch, predictions, references, accuracy, f1):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was asked"))
    expected = {"accuracy": accuracy, "macro_f1": pytest.approx(sum(f1) / 4)}
    assert scores(predictions, references, LABELS) == expected


@pytest.mark.parametrize(
    ("correct", "total", "interval"),
    [(81, 263, (0.2553, 0.3662)), (0, 20, (0.0000, 0.1611)), (1, 29, (0.0061, 0.1718))],
)
def test_wilson_interval_as_published(correct, total, interval):
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    assert wilson_interval(correct, total) == pytest.approx(interval, abs=5e-5)


def test_the_scoreboard_has_a_row_for_each_system():
    systems = {"majority": [0, 0, 0, 0], "tuned": [0, 1, 2, 3]}
    table = scoreboard([0, 1, 2, 3], systems, LABELS, {"majority": 7.0})
    assert table.index.tolist() == ["majority", "tuned"]
    low, high = wilson_interval(1, 4)
    f1_low, f1_high = macro_f1_interval([0, 0, 0, 0], [0, 1, 2, 3], LABELS)
    expected = {"accuracy": 0.25, "low": low, "high": high}
    expected |= {"macro_f1": 0.4 / 4, "f1_low": f1_low, "f1_high": f1_high}
    expected |= {"p_value": 0.25, "rows_per_second": 7.0, "correct": 1, "rows": 4}
    assert table.columns.tolist() == list(expected)
    assert table.loc["majority"].to_dict() == pytest.approx(expected)
    assert math.isnan(table.p_value["tuned"]) and math.isnan(table.rows_per_second["tuned"])
    assert table.loc["tuned", ["accuracy", "macro_f1", "correct"]].tolist() == [1.0, 1.0, 4]


@pytest.mark.parametrize(
    ("accuracy", "rows", "shares"),
    [(0.7, 80, [0.4, 0.3, 0.2, 0.1]), (0.99, 80, [0.25] * 4), (0.9, 2000, [0.4, 0.3, 0.2, 0.1])],
)
def test_the_interval_of_macro_f1_covers_it(accuracy, rows, shares):
    """Of a known system: the share of 200 intervals that hold it has a standard error of 0.015."""
    right, rng, covered, width = np.array(shares) * accuracy, np.random.default_rng(0), 0, 0.0
    wrong = np.array(shares) * (1 - accuracy) / 3
    truth = np.where(np.eye(4, dtype=bool), right, wrong[:, None])
    macro_f1 = (2 * right / (truth.sum(axis=0) + truth.sum(axis=1))).mean()
    for _ in range(200):
        pairs = rng.choice(16, rows, p=truth.ravel())
        low, high = macro_f1_interval(pairs % 4, pairs // 4, LABELS, draws=400)
        covered += low <= macro_f1 <= high
        width += (high - low) / 200
    assert 0.90 <= covered / 200 <= 0.99
    # 4 to 5 standard errors of an accuracy
    assert width < 5 * np.sqrt(accuracy * (1 - accuracy) / rows) + 2 / rows


def test_the_interval_of_macro_f1_without_an_error_is_like_wilsons():
    references = [i % 4 for i in range(80)]
    low, high = macro_f1_interval(references, references, LABELS)
    assert low == pytest.approx(wilson_interval(80, 80)[0], abs=0.02) and 0.99 < high <= 1
    low, high = macro_f1_interval([0, 1, 2] * 500, [0, 1, 2] * 500, LABELS)
    assert 0.74 < low < high <= 0.75  # one label is not there


def test_p_values_in_print():
    assert list(map(p_text, [1.0, 0.0127, 4.1e-9, 0.0])) == ["1", "0.013", "4.1e-09", "<1e-16"]


@pytest.mark.parametrize(
    ("wins", "losses", "p_value"),
    # twice the tail of a fair coin
    [(1, 9, 22 / 1024), (5, 5, 1.0), (0, 0, 1.0), (0, 6, 2 / 64)],
)
def test_mcnemar_counts_only_where_two_systems_differ(wins, losses, p_value):
    references = [0] * (wins + losses + 7)
    one = [0] * wins + [1] * losses + [0] * 4 + [2] * 3
    other = [1] * wins + [0] * losses + [0] * 4 + [3] * 3
    assert mcnemar(one, other, references) == pytest.approx(p_value)
    assert mcnemar(other, one, references) == pytest.approx(p_value)


def test_reliability_by_hand():
    probabilities = [[0.7, 0.2, 0.1], [0.1, 0.68, 0.22], [0.95, 0.03, 0.02], [0.35, 0.4, 0.25]]
    table, error = reliability(np.array(probabilities), [0, 0, 0, 1], bins=10)
    assert table.index.tolist() == [4, 7, 10] and table.rows.tolist() == [1, 2, 1]
    assert table.accuracy.tolist() == [1.0, 0.5, 1.0]
    assert table.confidence.tolist() == pytest.approx([0.4, 0.69, 0.95])
    assert error == pytest.approx((1 * 0.6 + 2 * 0.19 + 1 * 0.05) / 4)


def _logits(rows: int, rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(rows, 4)) * 2


def _drawn(probabilities: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Labels for which the probabilities are perfectly calibrated."""
    return (probabilities.cumsum(axis=1) > rng.random((len(probabilities), 1))).argmax(axis=1)


@pytest.mark.parametrize("rows", [80, 1000])
def test_the_calibration_error_by_chance_is_that_of_calibrated_models(rows):
    rng = np.random.default_rng(3)
    probabilities = softmax(_logits(rows, rng), axis=1)
    seen = [reliability(probabilities, _drawn(probabilities, rng))[1] for _ in range(200)]
    by_chance = ece_by_chance(probabilities)
    assert by_chance.mean() == pytest.approx(np.mean(seen), rel=0.05)
    assert np.percentile(by_chance, 95) == pytest.approx(np.percentile(seen, 95), rel=0.15)


@pytest.mark.parametrize("rows", [40, 400])
def test_a_temperature_is_used_where_it_is_significant_and_there_alone(rows):
    """Calibrated models get 1 in 19 of 20 draws; on 400 rows one that is twice too sure never."""
    rng, used, softened = np.random.default_rng(5), 0, 0
    for _ in range(100):
        logits = _logits(rows, rng)
        references = _drawn(softmax(logits, axis=1), rng)
        used += fit_temperature(softmax(logits, axis=1), references)[0] != 1
        softened += fit_temperature(softmax(2 * logits, axis=1), references)[0] > 1
    assert used <= 10
    assert softened == 100 if rows == 400 else softened > 75


def test_forty_rows_with_one_error_keep_their_confidence():
    """As in the small default run: 0.7 fits these rows, and would make others worse."""
    probabilities = np.array([[0.94, 0.03, 0.02, 0.01]] * 39 + [[0.6, 0.3, 0.05, 0.05]])
    temperature, reason = fit_temperature(probabilities, [0] * 39 + [1])
    assert temperature == 1.0
    said = "The temperature is 1, which .* on 40 validation rows, not above 3[.]84[.]"
    assert re.fullmatch(said, reason)


@pytest.mark.parametrize("temperature", [0.4, 2.5])
def test_the_temperature_that_made_the_probabilities_is_found_and_undone(temperature):
    rng = np.random.default_rng(1)
    logits = _logits(20_000, rng)
    references = _drawn(softmax(logits, axis=1), rng)
    confident = softmax(logits * temperature, axis=1)
    found, reason = fit_temperature(confident, references)
    assert found == pytest.approx(temperature, rel=0.04)
    assert reason.startswith(f"The temperature is {found:.2f}: ")
    right = softmax(logits, axis=1)
    np.testing.assert_allclose(with_temperature(confident, temperature), right, atol=1e-12)


def test_few_rows_that_are_all_right_do_not_ask_for_certainty():
    """A model that is right at 0.95 is right on 40 rows one time in eight; never on 4,000."""
    sure = np.array([[0.95, 0.03, 0.01, 0.01]])
    assert fit_temperature(sure.repeat(40, axis=0), [0] * 40)[0] == 1
    assert fit_temperature(sure.repeat(4000, axis=0), [0] * 4000)[0] < 0.5


def test_temperature_of_certain_rows_is_finite():
    probabilities = np.array([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [1.0, 0, 0, 0]])
    for references in ([0, 1, 0], [0, 1, 2]):
        found, _ = fit_temperature(probabilities, references)
        assert 0.25 <= found <= 10
        softened = with_temperature(probabilities, found)
        assert np.isfinite(np.log(softened)).all()
        np.testing.assert_allclose(softened.sum(axis=1), 1)
