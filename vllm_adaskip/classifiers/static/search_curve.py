# SPDX-License-Identifier: Apache-2.0
"""The picture of a greedy search: what the model loses with each unit that goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from vllm_adaskip.lab.fitting.greedy import Step
from vllm_adaskip.lab.fixed_plans import Entry

FILE = "search.png"


def draw_search(steps: Sequence[Step[Entry]], unit: str, folder: Path) -> None:
    """Draw the loss against the number of units left out, and name them; the last is the plan."""
    figure = Figure(figsize=(max(5.6, 0.5 * len(steps)), 3.6), layout="constrained")
    axes = figure.subplots()
    losses = [step.loss for step in steps]
    axes.plot(losses, marker="o", markersize=4)
    axes.plot(len(steps) - 1, losses[-1], marker="o", markersize=10, label="the plan")
    for place, step in enumerate(steps[1:], 1):
        axes.annotate(
            str(step.left_out[-1]), (place, step.loss), (0, 7), textcoords="offset points",
            ha="center", fontsize=7,
        )  # fmt: skip
    axes.margins(y=0.15)  # before a limit is set, which ends all scaling
    axes.set(
        xlabel=f"left out ({unit})",
        ylabel="loss, nats per answer token",
        xticks=range(0, len(steps), max(1, len(steps) // 12)),
        ylim=(0, None),
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(folder / FILE, dpi=110)
