# SPDX-License-Identifier: Apache-2.0
"""The picture of a fit: each term of the loss, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from vllm_adaskip.classifiers.first.fit.training import Curve

FILE = "curve.png"
#: Share of what a step adds to the running mean, which is drawn over the steps.
_SHARE = 0.1


def draw_curves(curves: Mapping[str, Curve], folder: Path) -> None:
    """Draw the phases side by side."""
    figure = Figure(figsize=(5.6 * len(curves), 3.6), layout="constrained")
    for axes, (phase, terms) in zip(figure.subplots(1, len(curves), squeeze=False)[0],
                                    curves.items(), strict=True):  # fmt: skip
        for name, values in terms.items():
            (line,) = axes.plot(_smooth(values), label=name)
            axes.plot(values, color=line.get_color(), alpha=0.25, linewidth=0.7)
        axes.set(title=phase, xlabel="step", ylabel="part of the loss", ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(folder / FILE, dpi=110)


def _smooth(values: list[float]) -> list[float]:
    mean, smooth = values[0], []
    for value in values:
        mean += _SHARE * (value - mean)
        smooth.append(mean)
    return smooth
