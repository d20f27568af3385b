import math
import re
import socket

import numpy as np
import pytest
from scipy import stats
from scipy.special import log_softmax, softmax
from sklearn.metrics import log_loss

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


def test_scores_with_a_label_that_is_never_predicted():
    references = [0, 0, 1, 1, 2, 2, 3, 3]
    predictions = [0, 0, 1, 0, 2, 1, 0, 0]
    f1_world = 2 * 2 / (2 + 5)  # 2 * right / (true + predicted)
    f1_sports = 2 * 1 / (2 + 2)
    f1_business = 2 * 1 / (2 + 1)
    macro_f1 = (f1_world + f1_sports + f1_business + 0) / 4
    assert scores(predictions, references, LABELS) == {
        "accuracy": 0.5,
        "macro_f1": pytest.approx(macro_f1),
    }


def test_macro_f1_counts_a_label_that_is_not_there_at_all():
    assert scores([0, 1, 2], [0, 1, 2], LABELS) == {
        "accuracy": 1.0,
        "macro_f1": pytest.approx(3 / 4),
    }


def test_scores_need_no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the metric went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert scores([3], [3], LABELS)["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_as_published(correct, total, low, high):
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_against_the_closed_formula():
    z, n, p = 1.959963984540054, 80, 68 / 80
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert wilson_interval(68, 80) == pytest.approx(
        ((centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)), abs=1e-12
    )


def test_the_scoreboard_has_a_row_for_each_system():
    table = scoreboard(
        [0, 1, 2, 3], {"majority": [0, 0, 0, 0], "tuned": [0, 1, 2, 3]}, LABELS, {"majority": 7.0}
    )
    assert table.index.tolist() == ["majority", "tuned"]
    low, high = wilson_interval(1, 4)
    f1_low, f1_high = macro_f1_interval([0, 0, 0, 0], [0, 1, 2, 3], LABELS)
    assert table.loc["majority"].to_dict() == pytest.approx(
        {
            "accuracy": 0.25,
            "low": low,
            "high": high,
            "macro_f1": 0.4 / 4,
            "f1_low": f1_low,
            "f1_high": f1_high,
            "p_value": 0.25,
            "rows_per_second": 7.0,
            "correct": 1,
            "rows": 4,
        }
    )
    assert math.isnan(table.p_value["tuned"]) and math.isnan(table.rows_per_second["tuned"])
    assert table.loc["tuned", ["accuracy", "macro_f1", "correct"]].tolist() == [1.0, 1.0, 4]


def _confusion(accuracy: float, shares: list[float]) -> np.ndarray:
    """The probability of each (true, predicted) pair: labels of `shares`, errors spread evenly."""
    errors = (
        (1 - np.eye(len(shares))) * (1 - accuracy) * np.array(shares)[:, None] / (len(shares) - 1)
    )
    return errors + np.diag(np.array(shares) * accuracy)


def _macro_f1(confusion: np.ndarray) -> float:
    return float((2 * np.diag(confusion) / (confusion.sum(axis=0) + confusion.sum(axis=1))).mean())


@pytest.mark.parametrize("shares", [[0.25] * 4, [0.4, 0.3, 0.2, 0.1]], ids=["equal", "unequal"])
@pytest.mark.parametrize("rows", [80, 400, 7600])
@pytest.mark.parametrize("accuracy", [0.5, 0.7, 0.9, 0.975, 0.99])
def test_the_interval_of_macro_f1_covers_it(accuracy, rows, shares):
    """400 draws of test rows from a known system: the share of intervals that hold its macro-F1
    has a standard error of 0.011."""
    truth, rng, covered, width = _confusion(accuracy, shares), np.random.default_rng(0), 0, 0.0
    for _ in range(400):
        pairs = rng.choice(truth.size, rows, p=truth.ravel())
        low, high = macro_f1_interval(pairs % 4, pairs // 4, LABELS, draws=500)
        covered += low <= _macro_f1(truth) <= high
        width += (high - low) / 400
    assert 0.915 <= covered / 400 <= 0.985
    assert (
        width < 5 * np.sqrt(accuracy * (1 - accuracy) / rows) + 2 / rows
    )  # 4 to 5 standard errors of an accuracy


def test_the_interval_of_macro_f1_without_an_error_is_like_wilsons():
    references = [i % 4 for i in range(80)]
    low, high = macro_f1_interval(references, references, LABELS)
    assert low == pytest.approx(wilson_interval(80, 80)[0], abs=0.02) and 0.99 < high <= 1
    assert macro_f1_interval(references, references, LABELS) == (low, high)


def test_the_interval_of_macro_f1_of_a_label_that_is_not_there():
    low, high = macro_f1_interval([0, 1, 2] * 500, [0, 1, 2] * 500, LABELS)
    assert 0.74 < low < high <= 0.75


@pytest.mark.parametrize(
    ("p", "text"),
    [(1.0, "1"), (0.0127, "0.013"), (4.1e-9, "4.1e-09"), (0.0, "<1e-16"), (1e-300, "<1e-16")],
)
def test_p_values_in_print(p, text):
    assert p_text(p) == text


def test_no_p_value_of_the_notebook_or_the_terminal_is_nought():
    assert p_text(mcnemar([0] * 4000, [1] * 4000, [0] * 4000)) == "<1e-16"


@pytest.mark.parametrize(
    ("wins", "losses", "p_value"),
    [
        (1, 9, 22 / 1024),
        (5, 5, 1.0),
        (0, 0, 1.0),
        (0, 6, 2 / 64),  # twice the tail of a fair coin
    ],
)
def test_mcnemar_counts_only_where_two_systems_differ(wins, losses, p_value):
    references = [0] * (wins + losses + 7)
    one = [0] * wins + [1] * losses + [0] * 4 + [2] * 3
    other = [1] * wins + [0] * losses + [0] * 4 + [3] * 3
    assert mcnemar(one, other, references) == pytest.approx(p_value)
    assert mcnemar(other, one, references) == pytest.approx(p_value)


def test_mcnemar_on_real_counts_is_near_the_chi_square_test():
    """Agresti, Categorical Data Analysis (1990), table 10.1: of the approval ratings 150 and 86 changed; the statistic is 17.36."""
    one, other = [0] * 150 + [1] * 86, [1] * 150 + [0] * 86
    assert mcnemar(one, other, [0] * 236) == pytest.approx(
        stats.chi2.sf((150 - 86) ** 2 / 236, 1), rel=0.35
    )
    assert pytest.approx(17.36, abs=0.005) == (150 - 86) ** 2 / 236


def test_reliability_by_hand():
    probabilities = np.array(
        [
            [0.7, 0.1, 0.1, 0.1],
            [0.1, 0.68, 0.12, 0.1],
            [0.95, 0.02, 0.02, 0.01],
            [0.3, 0.4, 0.2, 0.1],
        ]
    )
    table, error = reliability(probabilities, [0, 0, 0, 1], bins=10)
    assert table.index.tolist() == [4, 7, 10] and table.rows.tolist() == [1, 2, 1]
    assert table.accuracy.tolist() == [1.0, 0.5, 1.0]
    assert error == pytest.approx((1 * 0.6 + 2 * 0.19 + 1 * 0.05) / 4)


def test_probabilities_that_are_true_have_no_calibration_error():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([1, 1, 1, 1], 100_000)
    references = (probabilities.cumsum(axis=1) > rng.random((100_000, 1))).argmax(axis=1)
    assert reliability(probabilities, references)[1] < 0.006


def _calibrated(
    rows: int, rng: np.random.Generator, spread: float = 2.0
) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels drawn from them."""
    logits = rng.normal(size=(rows, 4)) * spread
    return logits, (softmax(logits, axis=1).cumsum(axis=1) > rng.random((rows, 1))).argmax(axis=1)


@pytest.mark.parametrize("rows", [80, 1000, 7600])
def test_the_calibration_error_by_chance_is_that_of_calibrated_models(rows):
    rng = np.random.default_rng(3)
    probabilities = softmax(_calibrated(rows, rng, spread=3.0)[0], axis=1)
    seen = []
    for _ in range(200):
        references = (probabilities.cumsum(axis=1) > rng.random((rows, 1))).argmax(axis=1)
        seen.append(reliability(probabilities, references)[1])
    by_chance = ece_by_chance(probabilities)
    assert by_chance.mean() == pytest.approx(np.mean(seen), rel=0.05)
    assert np.percentile(by_chance, 95) == pytest.approx(np.percentile(seen, 95), rel=0.15)
    np.testing.assert_array_equal(by_chance, ece_by_chance(probabilities))


@pytest.mark.parametrize("rows", [40, 400])
def test_a_temperature_is_used_where_it_is_significant_and_there_alone(rows):
    """Calibrated models get 1 in 19 of 20 draws; on 400 rows one that is twice too sure never."""
    rng, used, softened = np.random.default_rng(5), 0, 0
    for _ in range(300):
        logits, references = _calibrated(rows, rng)
        used += fit_temperature(softmax(logits, axis=1), references)[0] != 1
        softened += fit_temperature(softmax(2 * logits, axis=1), references)[0] > 1
    assert used / 300 < 0.075
    assert softened / 300 == 1 if rows == 400 else softened / 300 > 0.8


def test_forty_rows_with_one_error_keep_their_confidence():
    """As in the small default run: 0.7 fits these rows, and would make others worse."""
    probabilities = np.array([[0.94, 0.03, 0.02, 0.01]] * 39 + [[0.6, 0.3, 0.05, 0.05]])
    temperature, reason = fit_temperature(probabilities, [0] * 39 + [1])
    assert temperature == 1.0
    assert re.fullmatch(
        r"The temperature is 1, which changes nothing: twice the gain in log-likelihood of "
        r"0\.\d\d over 1 is \d\.\d on 40 "
        r"validation rows, not above 3\.84\.",
        reason,
    )


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_the_temperature_that_made_the_probabilities_is_found_and_undone(temperature):
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(50_000, 4)) * 2
    references = (softmax(logits, axis=1).cumsum(axis=1) > rng.random((50_000, 1))).argmax(axis=1)
    confident = softmax(logits * temperature, axis=1)
    found, reason = fit_temperature(confident, references)
    assert found == (1 if temperature == 1 else pytest.approx(temperature, rel=0.03))
    assert reason.startswith(
        f"The temperature is {found:.2f}: "
        if temperature != 1
        else "The temperature is 1, which changes nothing"
    )
    np.testing.assert_allclose(
        with_temperature(confident, temperature), softmax(logits, axis=1), atol=1e-12
    )
    assert reliability(with_temperature(confident, found), references)[1] < 0.01
    grid = np.linspace(0.5, 1.5, 41) * found
    losses = [log_loss(references, softmax(np.log(confident) / t, axis=1)) for t in grid]
    assert grid[np.argmin(losses)] == pytest.approx(found, rel=0.02)


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
        assert np.isfinite(log_softmax(with_temperature(probabilities, found), axis=1)).all()
        np.testing.assert_allclose(with_temperature(probabilities, found).sum(axis=1), 1)
