"""Accuracy and macro-F1 as an `evaluate` module that needs no hub, and the interval that goes with an accuracy."""

import datasets
import evaluate
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
