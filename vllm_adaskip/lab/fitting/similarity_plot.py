# SPDX-License-Identifier: Apache-2.0
"""The picture of similarities by layer: where MLPs hardly change the stream, and what is kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vllm_adaskip.lab.fitting.similarity import Similarities

FILE = "similarity.png"


def draw_similarities(
    found: Similarities, middle: range, threshold: float | None, folder: Path
) -> None:
    """Draw each sub-layer's mean; the ends that are kept are shaded, the threshold is dashed."""
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    layers = np.arange(found.prompts.shape[1] // 2)
    for values, what, colour in (
        (found.prompts, "prompts", "#1f6fb4"),
        (found.tokens, "answers", "#c8561b"),
    ):
        mlp, attention = values[:, 1::2], values[:, ::2]
        low, high = np.quantile(mlp, [0.1, 0.9], axis=0)
        axes.fill_between(layers, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(layers, mlp.mean(0), "o-", color=colour, label=f"MLP, {what}")
        axes.plot(
            layers, attention.mean(0), ":", color=colour, linewidth=1, label=f"attention, {what}"
        )
    for start, end in ((-0.5, middle.start - 0.5), (middle.stop - 0.5, len(layers) - 0.5)):
        axes.axvspan(start, end, color="0.5", alpha=0.12, linewidth=0)
    title = "bands: 10th to 90th percentile"
    if threshold is not None:
        axes.axhline(threshold, color="0.2", linestyle="--", linewidth=1)
        title = f"threshold {threshold:.4f} (dashed); {title}"
    axes.set(
        xlabel="decoder layer (shaded: always runs)",
        ylabel="cosine of the stream before and after",
        xlim=(-0.5, len(layers) - 0.5),
        ylim=(_bottom(found), 1.005),
        title=title,
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower center")
    figure.savefig(folder / FILE, dpi=110)


def _bottom(found: Similarities) -> float:
    """Give where the axis ends, so that an outlier at an end does not flatten the rest."""
    means = np.concatenate([found.prompts.mean(0), found.tokens.mean(0)])
    return float(np.quantile(means, 0.1)) - 0.05
