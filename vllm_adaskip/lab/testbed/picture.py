# SPDX-License-Identifier: Apache-2.0
"""Pictures of the training and of the scores."""

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def loss_curve(table: Path, target: Path) -> None:
    """Draw the training loss over the tokens seen: each step, and a running mean."""
    with table.open() as file:
        rows = list(csv.DictReader(file))
    tokens = [int(row["tokens"]) / 1e6 for row in rows]
    losses = [float(row["loss"]) for row in rows]
    mean, smooth = losses[0], []
    for loss in losses:
        mean += 0.2 * (loss - mean)
        smooth.append(mean)
    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    axes.plot(tokens, losses, color="lightgrey", linewidth=0.8, label="one step")
    axes.plot(tokens, smooth, color="tab:blue", label="running mean")
    axes.set(xlabel="million tokens", ylabel="loss on answers", yscale="log")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(target, dpi=120)
    pyplot.close(figure)


def deleted_layers(table: Path, target: Path) -> None:
    """Draw exact match per task (column) with each set of layers deleted (row)."""
    with table.open() as file:
        head, *rows = list(csv.reader(file))
    figure, axes = pyplot.subplots(figsize=(8, 5))
    values = [[100 * float(value) for value in row[1:]] for row in rows]
    axes.imshow(values, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            colour = "white" if value > 60 else "black"
            axes.text(x, y, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(head) - 1), head[1:], rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.set(ylabel="layers deleted", title="exact match on held-out questions, %")
    figure.tight_layout()
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
