"""Figures: each function takes data and returns a matplotlib Figure. The colours are Okabe and Ito's, safe for colour-blind readers."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from qlora_helpers.data import LABELS

COLOURS = dict(zip(LABELS, ["#0072B2", "#E69F00", "#009E73", "#CC79A7"], strict=True))


def loss_curves(history: dict) -> Figure:
    """Training and validation loss, and validation accuracy by epoch; the epoch that was kept is marked."""
    fig, (left, right) = _figure(2, width=4.8, height=3.2)
    train, validation = pd.DataFrame(history["train"]), pd.DataFrame(history["validation"])
    left.plot(train.epoch, train.loss, color=COLOURS["World"], label="training loss", alpha=0.8)
    left.plot(validation.epoch, validation.loss, "o-", color=COLOURS["Sports"], label="validation loss")
    left.axhline(np.log(len(LABELS)), color="grey", linestyle=":", label=f"guessing: ln {len(LABELS)} = {np.log(len(LABELS)):.2f}")
    right.plot(validation.epoch, validation.accuracy, "o-", color=COLOURS["Business"], label="validation accuracy")
    right.plot(validation.epoch, validation.macro_f1, "s--", color=COLOURS["Sci/Tech"], label="validation macro-F1")
    left.set(xlabel="epoch", ylabel="loss", ylim=(0, None))
    right.set(xlabel="epoch", ylabel="score", ylim=(0, 1.02))
    for ax, place in ((left, "upper right"), (right, "lower right")):
        ax.axvline(history["best_epoch"], color="black", linewidth=0.8, linestyle="--", label=f"kept: epoch {history['best_epoch']:g}")
        ax.legend(frameon=False, fontsize=8, loc=place)
    return fig


def scoreboard_bars(table: pd.DataFrame) -> Figure:
    """Accuracy of each system of `metrics.scoreboard`, with its 95% interval."""
    fig, (ax,) = _figure(1, width=7, height=0.55 * len(table) + 0.9)
    rows = table.iloc[::-1]
    errors = np.abs(np.array([rows.accuracy - rows.low, rows.high - rows.accuracy]))
    ax.barh(rows.index, rows.accuracy, xerr=errors, capsize=4, color=["#009E73"] + ["#999999"] * (len(rows) - 1))
    for y, value in enumerate(rows.accuracy):
        ax.text(0.02, y, f"{value:.3f}", va="center", color="white", fontweight="bold")
    ax.set(xlim=(0, 1), xlabel="accuracy on the test rows, with its 95% interval")
    return fig


def probability_bars(text: str, probabilities: np.ndarray) -> Figure:
    """The probability of each label for one text: the static twin of the panel's bars."""
    fig, (ax,) = _figure(1, width=6, height=2)
    bars = ax.barh(LABELS[::-1], probabilities[::-1], color=list(COLOURS.values())[::-1])
    ax.bar_label(bars, [f"{p:.1%}" for p in probabilities[::-1]], padding=3)
    ax.set(xlim=(0, 1.12), xticks=[])
    ax.set_title(text.replace("$", r"\$"), loc="left", fontsize=9, wrap=True)
    return fig


def _figure(columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    fig, axes = plt.subplots(1, columns, figsize=(width * columns, height), layout="constrained", squeeze=False)
    for ax in axes[0]:
        ax.spines[["top", "right"]].set_visible(False)
    plt.close(fig)  # else Jupyter shows it twice: once as pyplot's open figure, once as the cell's value
    return fig, axes[0]
