"""Figures: each function takes data and returns a matplotlib Figure."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442"]
X_AXES = {"epochs": "epoch", "steps": "step", "minutes": "minutes"}
_GREYS = ["0.3", "0.5", "0.65", "0.75"]


def loss_curves(
    history: dict,
    x: str = "epochs",
    smoothing: float = 0.6,
    log: bool = False,
    earlier: dict[str, dict] | None = None,
) -> Figure:
    """Return the training and validation loss, and validation accuracy and macro-F1, side by side.

    Args:
        history: a training's `training.json`; the epoch that was kept is marked.
        x: a key of X_AXES.
        smoothing: the weight of the past in an exponential moving average of the training loss.
        log: whether the loss has a logarithmic axis.
        earlier: histories of other runs by name, whose validation is drawn in grey.
    """
    fig, (left, right) = _figure(2, width=4.8, height=3.2)
    column, label_count = X_AXES[x], len(history["label_words"])
    train, validation = _table(history, "train"), _table(history, "validation")

    def line(ax, table, score, style, colour, label, **options):
        ax.plot(table[column], table[score], style, color=colour, label=label, **options)

    for i, (name, other) in enumerate((earlier or {}).items()):
        table, grey = _table(other, "validation"), _GREYS[i % len(_GREYS)]
        for ax, score in ((left, "loss"), (right, "accuracy")):
            label = f"validation, {literal(name)}"
            line(ax, table, score, "o:", grey, label, markersize=3, linewidth=1)
    line(left, train, "loss", "-", COLOURS[0], None, alpha=0.25)
    smooth = train.assign(loss=train.loss.ewm(alpha=1 - smoothing).mean())
    label = f"training loss, smoothed by {smoothing:g}" if smoothing else "training loss"
    line(left, smooth, "loss", "-", COLOURS[0], label)
    line(left, validation, "loss", "o-", COLOURS[1], "validation loss")
    line(right, validation, "accuracy", "o-", COLOURS[2], "validation accuracy")
    line(right, validation, "macro_f1", "s--", COLOURS[3], "validation macro-F1")
    guess = np.log(label_count)
    label = f"guessing: ln {label_count} = {guess:.2f}"
    left.axhline(guess, color="grey", linestyle=":", label=label)
    left.set(xlabel=x, ylabel="loss")
    if log:
        left.set_yscale("log")
    else:
        left.set_ylim(0, None)
    right.set(xlabel=x, ylabel="score", ylim=(0, 1.02))
    if history["best_epoch"] is not None:
        kept = validation[validation.epoch == history["best_epoch"]].iloc[0]
        style = {"color": "black", "linewidth": 0.8, "linestyle": "--", "zorder": 0}
        for ax in (left, right):
            ax.axvline(kept[column], **style, label=f"kept: epoch {kept.epoch:g}")
    for ax in (left, right):
        # Above the axes, where no line runs through it.
        place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1), "ncols": 2}
        ax.legend(frameon=False, fontsize=7.5, **place)
    return fig


def _table(history: dict, split: str) -> pd.DataFrame:
    columns = ["epoch", "step", "seconds", "loss", "accuracy", "macro_f1"]
    table = pd.DataFrame(history[split], columns=columns, dtype=float)
    return table.assign(minutes=table.seconds / 60)


def scoreboard_bars(table: pd.DataFrame) -> Figure:
    """Return the accuracy of each system of `metrics.scoreboard`, with its 95% interval."""
    fig, (ax,) = _figure(1, width=7, height=0.55 * len(table) + 0.9)
    rows = table.iloc[::-1]
    errors = [rows.accuracy - rows.low, rows.high - rows.accuracy]
    colours = ["#009E73"] + ["#999999"] * (len(rows) - 1)
    ax.barh(rows.index, rows.accuracy, xerr=np.abs(errors), capsize=4, color=colours)
    for y, value in enumerate(rows.accuracy):
        ax.text(0.02, y, f"{value:.3f}", va="center", color="white", fontweight="bold")
    ax.set(xlim=(0, 1), xlabel="accuracy on the test rows, with its 95% interval")
    return fig


def reliability_diagram(tables: dict[str, pd.DataFrame]) -> Figure:
    """Return accuracy against confidence, for each of `metrics.reliability`'s tables by name; a
    point's area is its share of the rows."""
    fig, (ax,) = _figure(1, width=4.6, height=3.8)
    ax.plot([0, 1], [0, 1], color="grey", linestyle=":", label="confidence = accuracy")
    for i, (name, table) in enumerate(tables.items()):
        style = {"color": COLOURS[i], "alpha": 0.6}
        ax.plot(table.confidence, table.accuracy, **style)
        sizes = 20 + 300 * table.rows / table.rows.sum()
        ax.scatter(table.confidence, table.accuracy, s=sizes, label=name, **style)
    ax.set(xlabel="confidence: the probability of the label that was chosen", ylabel="accuracy")
    ax.set(xlim=(0, 1.03), ylim=(0, 1.05))
    legend = ax.legend(frameon=False, fontsize=8, loc="upper left")
    for handle in legend.legend_handles[1:]:
        handle.set_sizes([40])
    return fig


def label_colours(labels: Sequence[str]) -> list[str]:
    """Return a colour for each label; beyond seven they repeat."""
    return [COLOURS[i % len(COLOURS)] for i in range(len(labels))]


def literal(text: str) -> str:
    """Return `text` so that a figure shows it as it is: a pair of $ would hold a formula."""
    return text.replace("$", r"\$")


def probability_bars(text: str, probabilities: np.ndarray, labels: Sequence[str]) -> Figure:
    """Return the probability of each label for one text, as bars."""
    fig, (ax,) = _figure(1, width=6, height=0.8 + 0.3 * len(labels))
    names = [literal(label) for label in labels]
    bars = ax.barh(names[::-1], probabilities[::-1], color=label_colours(labels)[::-1])
    ax.bar_label(bars, [f"{p:.1%}" for p in probabilities[::-1]], padding=3)
    ax.set(xlim=(0, 1.12), xticks=[])
    ax.set_title(literal(text), loc="left", fontsize=9, wrap=True)
    return fig


def _figure(columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    size = (width * columns, height)
    fig, axes = plt.subplots(1, columns, figsize=size, layout="constrained", squeeze=False)
    for ax in axes[0]:
        ax.spines[["top", "right"]].set_visible(False)
    # Jupyter would show an open figure twice: once by itself, once as the cell's value.
    plt.close(fig)
    return fig, axes[0]
