"""Accuracy and macro-F1 as an `evaluate` module that needs no hub, and the interval that goes with an accuracy."""

import datasets
import evaluate
import pandas as pd
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, f1_score

from qlora_helpers.data import LABELS


class ClassificationScores(evaluate.Metric):
    """Accuracy, and F1 averaged over all labels with equal weight, of predicted and true label indices."""

    def _info(self):
        return evaluate.MetricInfo(
            description=self.__doc__, citation="", inputs_description="label indices",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}))

    def _compute(self, predictions, references):
        macro_f1 = f1_score(references, predictions, labels=range(len(LABELS)), average="macro", zero_division=0)
        return {"accuracy": float(accuracy_score(references, predictions)), "macro_f1": float(macro_f1)}


def scores(predictions, references) -> dict[str, float]:
    """`accuracy` and `macro_f1` of label indices, through ClassificationScores."""
    return ClassificationScores(keep_in_memory=True).compute(predictions=predictions, references=references)


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """The 95% interval of an accuracy of `correct` out of `total` (Wilson, 1927)."""
    interval = binomtest(correct, total).proportion_ci(confidence_level=0.95, method="wilson")
    return interval.low, interval.high


def scoreboard(references: list[int], systems: dict[str, list[int]]) -> pd.DataFrame:
    """One row for each system's predictions: `accuracy`, its 95% interval (`low`, `high`), `macro_f1`, and `correct` of `rows`."""
    table = {}
    for name, predictions in systems.items():
        correct = int(sum(p == r for p, r in zip(predictions, references, strict=True)))
        low, high = wilson_interval(correct, len(references))
        both = scores(predictions, references)
        table[name] = {"accuracy": both["accuracy"], "low": low, "high": high, "macro_f1": both["macro_f1"],
                       "correct": correct, "rows": len(references)}
    return pd.DataFrame.from_dict(table, orient="index")
