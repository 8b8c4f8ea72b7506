# SPDX-License-Identifier: Apache-2.0
"""Searches for one plan that all sequences follow: what may go, how much, and which of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from matplotlib.figure import Figure
from pydantic import Field

from vllm_adaskip.classifiers.ends import EndsOptions
from vllm_adaskip.classifiers.plan import SkipPlan
from vllm_adaskip.lab.fitting.greedy import Step, greedy, trials
from vllm_adaskip.lab.fixed_plans import Entry, Unit, at_random, evenly, latest, units

Search = Literal["greedy", "late", "uniform", "random"]
Loss = Callable[[SkipPlan], float]
#: In the fit's folder: losses that are known, and the picture of the search.
LOSSES, PICTURE = "losses.json", "search.png"


class StaticSettings(EndsOptions):
    """All that decides what comes of a search, but for model and examples.

    Attributes:
        search: ``greedy`` asks for losses (SLEB, arXiv 2402.09025, by layers), the others do not:
            ``late`` takes the last (arXiv 2407.15516, by attention), ``uniform`` evenly spaced
            ones (arXiv 2404.06954), ``random`` any.
        unit: what is left out one by one.
        target_skip: share of the model's units to leave out, rounded to a whole number.
        seed: of ``random``.

    """

    search: Search = "greedy"
    unit: Unit = "layer"
    target_skip: float = Field(default=0.25, gt=0, lt=1)
    seed: int = 0

    def candidates(self, num_layers: int) -> list[Entry]:
        """Return what may be left out (`PlanError`: the ends keep all, or nothing)."""
        return units(self.unit, self.inner(num_layers))

    def count(self, num_layers: int) -> int:
        """Return how many of them are left out (`ValueError`: none, or more than there are)."""
        there, allowed = len(units(self.unit, range(num_layers))), len(self.candidates(num_layers))
        count = round(self.target_skip * there)
        told = f"target_skip {self.target_skip:g} is {count} of {there}, --unit {self.unit}"
        if count == 0:
            least = (500 // there + 1) / 1000
            raise ValueError(f"{told}; the smallest that leaves any out is {least:g}")
        if count > allowed:
            raise ValueError(
                f"{told}; allowed: up to {allowed}, as keep_first and keep_last keep the others"
            )
        return count

    def losses(self, num_layers: int) -> int:
        """Count the losses that `search` asks for."""
        if self.search != "greedy":
            return 2
        return 1 + trials(len(self.candidates(num_layers)), self.count(num_layers))


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        plan: the last step's.
        steps: from nothing left out to the plan; ``greedy`` has one for each unit.

    """

    plan: SkipPlan
    steps: Sequence[Step[Entry]]


def search(loss: Loss, settings: StaticSettings, num_layers: int) -> Found:
    """Search for a plan of a model of this depth, by what it loses under plans."""
    candidates, count = settings.candidates(num_layers), settings.count(num_layers)

    def without(left_out: Sequence[Entry]) -> float:
        return loss(SkipPlan.parse([*left_out], num_layers))

    steps = [Step[Entry]((), without(()))]
    if settings.search == "greedy":
        steps += greedy(without, candidates, count)
    else:
        chosen = tuple(_chosen(settings, candidates, count))
        steps.append(Step(chosen, without(chosen)))
    return Found(SkipPlan.parse([*steps[-1].left_out], num_layers), steps)


def _chosen(settings: StaticSettings, candidates: Sequence[Entry], count: int) -> list[Entry]:
    if settings.search == "random":
        return at_random(candidates, count, settings.seed)
    return (latest if settings.search == "late" else evenly)(candidates, count)


class KnownLosses:
    """A loss of plans that is not worked out twice, in this process or a later one.

    Args:
        folder: of the fit, which `start_or_resume` holds to one model and one set of examples.
        loss: what is asked for plans that are not known yet.

    """

    def __init__(self, folder: Path, loss: Callable[[SkipPlan], float]) -> None:
        self._path, self._loss = folder / LOSSES, loss
        self._known: dict[str, float] = {}
        if self._path.exists():
            self._known = json.loads(self._path.read_text())

    def __call__(self, plan: SkipPlan) -> float:
        """Return a plan's loss."""
        if (name := str(plan)) not in self._known:
            self._known[name] = self._loss(plan)
            (part := self._path.with_suffix(".part")).write_text(json.dumps(self._known))
            part.replace(self._path)
        return self._known[name]


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
    figure.savefig(folder / PICTURE, dpi=110)
