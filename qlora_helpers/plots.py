"""Figures: each function takes data and returns a matplotlib Figure. The colours are Okabe and Ito's, safe for colour-blind readers."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442"]
X_AXES = {"epochs": "epoch", "steps": "step", "minutes": "minutes"}


def loss_curves(
    history: dict,
    x: str = "epochs",
    smoothing: float = 0.6,
    log: bool = False,
    earlier: dict[str, dict] | None = None,
) -> Figure:
    """Training and validation loss, and validation accuracy, over `x` (of X_AXES); the epoch that was kept is marked. `smoothing` is the
    weight of the past in an exponential moving average of the training loss (0: none). `earlier` are other runs' histories, by name."""
    fig, (left, right) = _figure(2, width=4.8, height=3.2)
    train, validation = _table(history, "train"), _table(history, "validation")
    column = X_AXES[x]
    for (name, other), colour in zip(
        (earlier or {}).items(), ["0.3", "0.5", "0.65", "0.75"] * 9, strict=False
    ):
        for ax, score, style in ((left, "loss", "o:"), (right, "accuracy", "o:")):
            table = _table(other, "validation")
            ax.plot(
                table[column],
                table[score],
                style,
                color=colour,
                markersize=3,
                linewidth=1,
                label=f"validation, {name}",
            )
    if len(train):
        if smoothing:
            left.plot(train[column], train.loss, color=COLOURS[0], alpha=0.25)
        left.plot(
            train[column],
            train.loss.ewm(alpha=1 - smoothing).mean(),
            color=COLOURS[0],
            label="training loss" + f", smoothed by {smoothing:g}" * bool(smoothing),
        )
    if len(validation):
        left.plot(
            validation[column], validation.loss, "o-", color=COLOURS[1], label="validation loss"
        )
        right.plot(
            validation[column],
            validation.accuracy,
            "o-",
            color=COLOURS[2],
            label="validation accuracy",
        )
        right.plot(
            validation[column],
            validation.macro_f1,
            "s--",
            color=COLOURS[3],
            label="validation macro-F1",
        )
    labels = len(history["label_words"])
    left.axhline(
        np.log(labels),
        color="grey",
        linestyle=":",
        label=f"guessing: ln {labels} = {np.log(labels):.2f}",
    )
    left.set(xlabel=x, ylabel="loss", **({"yscale": "log"} if log else {"ylim": (0, None)}))
    right.set(xlabel=x, ylabel="score", ylim=(0, 1.02))
    if history["best_epoch"] is not None:
        kept = validation[validation.epoch == history["best_epoch"]].iloc[0]
        for ax in (left, right):
            ax.axvline(
                kept[column],
                color="black",
                linewidth=0.8,
                linestyle="--",
                zorder=0,
                label=f"kept: epoch {kept.epoch:g}",
            )
    for ax in (left, right)[: 1 + bool(len(validation))]:
        ax.legend(
            frameon=False, fontsize=7.5, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2
        )  # above: no line runs through it
    return fig


def _table(history: dict, split: str) -> pd.DataFrame:
    table = pd.DataFrame(history[split])
    return table.assign(minutes=table.seconds / 60) if len(table) else table


def scoreboard_bars(table: pd.DataFrame) -> Figure:
    """Accuracy of each system of `metrics.scoreboard`, with its 95% interval."""
    fig, (ax,) = _figure(1, width=7, height=0.55 * len(table) + 0.9)
    rows = table.iloc[::-1]
    errors = np.abs(np.array([rows.accuracy - rows.low, rows.high - rows.accuracy]))
    ax.barh(
        rows.index,
        rows.accuracy,
        xerr=errors,
        capsize=4,
        color=["#009E73"] + ["#999999"] * (len(rows) - 1),
    )
    for y, value in enumerate(rows.accuracy):
        ax.text(0.02, y, f"{value:.3f}", va="center", color="white", fontweight="bold")
    ax.set(xlim=(0, 1), xlabel="accuracy on the test rows, with its 95% interval")
    return fig


def reliability_diagram(tables: dict[str, pd.DataFrame]) -> Figure:
    """Accuracy against confidence, of each of `metrics.reliability`'s tables; a point's area is its share of the rows."""
    fig, (ax,) = _figure(1, width=4.6, height=3.8)
    ax.plot([0, 1], [0, 1], color="grey", linestyle=":", label="confidence = accuracy")
    for (name, table), colour in zip(tables.items(), COLOURS, strict=False):
        ax.plot(table.confidence, table.accuracy, color=colour, alpha=0.6)
        ax.scatter(
            table.confidence,
            table.accuracy,
            s=20 + 300 * table.rows / table.rows.sum(),
            color=colour,
            alpha=0.6,
            label=name,
        )
    ax.set(
        xlabel="confidence: the probability of the label that was chosen",
        ylabel="accuracy",
        xlim=(0, 1.03),
        ylim=(0, 1.05),
    )
    legend = ax.legend(frameon=False, fontsize=8, loc="upper left")
    for handle in legend.legend_handles[1:]:
        handle.set_sizes([40])
    return fig


def learning_curve(table: pd.DataFrame) -> Figure:
    """Accuracy against training rows, a line for each column of `curve.learning_curve`'s table."""
    fig, (ax,) = _figure(1, width=6, height=3.4)
    for name, colour in zip(table.columns, COLOURS, strict=False):
        ax.plot(table.index, table[name], "o-", color=colour, label=name)
    ax.set(
        xlabel="training rows",
        ylabel="accuracy on the test rows",
        xscale="log",
        xticks=table.index,
        ylim=(None, 1),
    )
    ax.set_xticks(table.index, map(str, table.index), minor=False)
    ax.minorticks_off()
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    return fig


def label_colours(labels: Sequence[str]) -> list[str]:
    """A colour for each label; beyond seven they repeat."""
    return [COLOURS[i % len(COLOURS)] for i in range(len(labels))]


def probability_bars(text: str, probabilities: np.ndarray, labels: Sequence[str]) -> Figure:
    """The probability of each label for one text: the static twin of the panel's bars."""
    fig, (ax,) = _figure(1, width=6, height=0.8 + 0.3 * len(labels))
    bars = ax.barh(labels[::-1], probabilities[::-1], color=label_colours(labels)[::-1])
    ax.bar_label(bars, [f"{p:.1%}" for p in probabilities[::-1]], padding=3)
    ax.set(xlim=(0, 1.12), xticks=[])
    ax.set_title(text.replace("$", r"\$"), loc="left", fontsize=9, wrap=True)
    return fig


def _figure(columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    fig, axes = plt.subplots(
        1, columns, figsize=(width * columns, height), layout="constrained", squeeze=False
    )
    for ax in axes[0]:
        ax.spines[["top", "right"]].set_visible(False)
    plt.close(
        fig
    )  # else Jupyter shows it twice: once as pyplot's open figure, once as the cell's value
    return fig, axes[0]
