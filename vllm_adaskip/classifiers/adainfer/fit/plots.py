# SPDX-License-Identifier: Apache-2.0
"""The pictures of a fit of AdaInfer: what is seen after each layer, and what being sure costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from vllm_adaskip.classifiers.adainfer.fit.cases import Cases
from vllm_adaskip.classifiers.adainfer.fit.check_layers import Look

FEATURES, COVERAGE = "features.png", "coverage.png"


def draw_features(cases: Cases, check_layers: Sequence[int], folder: Path) -> None:
    """Draw both features and the label by layer, task by task; check layers are dotted."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    layers = np.arange(cases.agrees.shape[1])
    curves = {
        "top_prob": cases.features[:, :, 0],
        "gap": cases.features[:, :, 1],
        "likeliest token is the final one": cases.agrees.astype(np.float64),
    }
    for axes, (title, values) in zip(figure.subplots(1, 3), curves.items(), strict=True):
        for task in np.unique(cases.tasks):
            own = values[cases.tasks == task]
            (line,) = axes.plot(layers, own.mean(0), "o-", markersize=3, label=task)
            if title in ("top_prob", "gap"):
                low, high = np.quantile(own, [0.1, 0.9], axis=0)
                axes.fill_between(layers, low, high, color=line.get_color(), alpha=0.1, linewidth=0)
        for layer in check_layers:
            axes.axvline(layer, color="0.4", linestyle=":", linewidth=1)
        axes.set(title=title, xlabel="after decoder layer", ylim=(-0.02, 1.02))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle("mean and 10th to 90th percentile; dotted: check layers", fontsize=9)
    figure.savefig(folder / FEATURES, dpi=110)


def draw_coverage(looks: Sequence[Look], chosen: Look, classifier: str, folder: Path) -> None:
    """Draw layers left out against agreement, over levels, by cross-validation."""
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    ordered = sorted(looks, key=lambda one: one.level)
    for what, shares in (
        ("layers left out", [one.pruned for one in ordered]),
        ("the same less the cost of looking", [one.net for one in ordered]),
        ("cases that stop", [one.stopped for one in ordered]),
    ):
        axes.plot([one.agreement for one in ordered], shares, "o-", markersize=4, label=what)
    axes.plot(chosen.agreement, chosen.pruned, "o", markersize=11, mfc="none", color="black",
              label=f"chosen, at level {chosen.level:g}")  # fmt: skip
    axes.set(
        title=f"classifier {classifier}, cross-validation",
        xlabel="agreement of those who stop",
        ylabel="share",
        ylim=(0, 1.02),
    )
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(folder / COVERAGE, dpi=110)
