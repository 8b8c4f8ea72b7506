# SPDX-License-Identifier: Apache-2.0
"""What limits a decode step, by batch and context, and which kind of plan pays there."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vllm_adaskip.classifiers import SkipPlan
from vllm_adaskip.lab.bench.engines import decode, following
from vllm_adaskip.lab.bench.machine import Machine
from vllm_adaskip.lab.bench.plans import deal, distinct, shared
from vllm_adaskip.lab.bench.rounds import Run, Spread, ratio, take_turns
from vllm_adaskip.lab.bench.shapes import Shape
from vllm_adaskip.lab.bench.work import Work
from vllm_adaskip.lab.fixed_plans import Unit

DENSE = "dense"
UNITS: dict[str, Unit] = {"layers": "layer", "attention": "attention", "MLPs": "mlp"}
#: Distinct plans of a mixed batch.
_MIXED = 64


@dataclass(frozen=True)
class Regime:
    """A cell of the grid.

    Attributes:
        model: name of the shape.
        batch: sequences.
        context: tokens of each.
        seconds: of a dense step.
        limits: share of the dense step that each limit would take alone on this machine:
            reading weights, reading K/V, computing.
        gains: kind of plan without half of that -> dense time over its time.

    """

    model: str
    batch: int
    context: int
    seconds: float
    limits: dict[str, float]
    gains: dict[str, Spread]

    @property
    def limit(self) -> str:
        """The largest limit."""
        return max(self.limits, key=self.limits.__getitem__)

    def as_json(self) -> dict[str, Any]:
        """Return what stands in the JSON."""
        return {**asdict(self), "limit": self.limit}


def regimes(
    llm: Any,
    shape: Shape,
    machine: Machine,
    grid: Sequence[tuple[int, int]],
    *,
    rounds: int,
    steps: int,
) -> Iterator[Regime]:
    """Time every ``(batch, context)`` of a grid in an engine of the plugin with prefix caching.

    With it a prompt is computed once, whatever plan follows it.
    """
    for batch, context in grid:
        plans = kinds_of_plans(shape.num_layers, batch)
        variants: dict[str, Run] = {
            name: _run(llm, rows, steps, context) for name, rows in plans.items()
        }
        taken = take_turns(variants, rounds, lambda: None)
        seconds = statistics.median(taken[DENSE])
        work = Work.of(shape, plans[DENSE], context)
        yield Regime(
            shape.name,
            batch,
            context,
            seconds,
            {
                "weights": work.weight_bytes / machine.bandwidth / seconds,
                "K/V": work.kv_bytes / machine.bandwidth / seconds,
                "operations": work.operations / machine.rate / seconds,
            },
            {name: ratio(taken, DENSE, name) for name in plans if name != DENSE},
        )


def kinds_of_plans(num_layers: int, batch: int) -> dict[str, list[SkipPlan]]:
    """Return the rows' plans of each kind: half of something, all rows the same or each another."""
    found = {DENSE: [SkipPlan(num_layers)] * batch}
    for name, unit in UNITS.items():
        found[f"{name}, shared"] = [shared(num_layers, unit=unit)] * batch
        if batch > 1:
            several = distinct(num_layers, min(batch, _MIXED), unit=unit)
            found[f"{name}, mixed"] = deal(several, batch)
    return found


def _run(llm: Any, plans: list[SkipPlan], steps: int, context: int) -> Run:
    arguments = following(plans)
    return lambda: statistics.median(decode(llm, arguments, steps, prompt=context, again=True))
