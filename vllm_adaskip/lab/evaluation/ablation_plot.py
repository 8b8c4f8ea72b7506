# SPDX-License-Identifier: Apache-2.0
"""Draws families of settings against compute kept, each point the mean over its seeds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from vllm_adaskip.lab.evaluation.quality import Interval, interval
from vllm_adaskip.lab.evaluation.results import Answer, Setting
from vllm_adaskip.lab.evaluation.summary import Summary


@dataclass(frozen=True)
class Group:
    """Settings of one family that ask for as much: seeds of a method, draws of random plans.

    Attributes:
        kept: share of compute kept, mean over the settings.
        score: mean score.
        loss: to dense, paired by item after averaging each item over the settings.
        worst: the task that loses most, and how much.
        members: how many settings.

    """

    family: str
    asked: str
    kept: float
    score: float
    loss: Interval
    worst: tuple[str, float]
    members: int


def groups(summary: Summary, answers: Iterable[Answer]) -> list[Group]:
    """Average the settings of each family that differ in their seed alone."""
    scores: dict[str, dict[str, float]] = {}
    for answer in answers:
        scores.setdefault(answer.setting, {})[answer.item] = answer.score
    dense = scores[summary.dense.name]
    members: dict[tuple[str, str], list[str]] = {}
    kept = {one.name: one.kept for one in summary.others}
    for one in summary.others:
        members.setdefault((one.setting.family, asked(one.setting)), []).append(one.name)
    return [
        _group(family, share, names, kept, dense, scores)
        for (family, share), names in members.items()
    ]


def asked(setting: Setting) -> str:
    """Say how much a setting was asked to leave out, without its seed."""
    words = setting.name.removeprefix(setting.family).split()
    return " ".join(word for word in words if not word.startswith("#"))


def _group(
    family: str,
    share: str,
    names: list[str],
    kept: dict[str, float],
    dense: dict[str, float],
    scores: dict[str, dict[str, float]],
) -> Group:
    items = [item for item in dense if all(item in scores[name] for name in names)]
    own = np.array([[scores[name][item] for item in items] for name in names]).mean(0)
    lost = np.array([dense[item] for item in items]) - own
    tasks = np.array([item.rpartition("/")[0] for item in items])
    by_task = {str(task): float(lost[tasks == task].mean()) for task in np.unique(tasks)}
    worst = max(by_task.items(), key=lambda each: each[1])
    mean_kept = float(np.mean([kept[name] for name in names]))
    return Group(family, share, mean_kept, float(own.mean()), interval(lost), worst, len(names))


def draw(found: Iterable[Group], path: Path) -> None:
    """Write the plot."""
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.add_subplot()
    for (family, group), marker in zip(_by_family(found), _markers(), strict=False):
        x = [one.kept for one in group]
        y = [one.score for one in group]
        # Bars of the loss to dense, around the score.
        low = [max(0.0, one.loss.high - one.loss.mean) for one in group]
        high = [max(0.0, one.loss.mean - one.loss.low) for one in group]
        axes.errorbar(
            x, y, yerr=[low, high], marker=marker, label=family, linewidth=1, capsize=2, alpha=0.85
        )
    axes.set(xlabel="share of decoder compute kept", ylabel="mean score")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _by_family(found: Iterable[Group]) -> Iterator[tuple[str, list[Group]]]:
    families: dict[str, list[Group]] = {}
    for one in found:
        families.setdefault(one.family, []).append(one)
    for family, group in families.items():
        yield family, sorted(group, key=lambda one: one.kept)


def _markers() -> Iterator[str]:
    while True:
        yield from "osD^vPX"  # seven, as colours are ten: together they come round late
