# SPDX-License-Identifier: Apache-2.0
"""What a decode step takes: compiled stock vLLM, ours dense, and ours under plans.

All layers have the same shape, so a few plans say what any plan takes: a step that leaves the
compiled code has a fixed price, and each attention and each MLP that is left out saves its part.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from vllm_adaskip.classifiers.plan import SkipPlan
from vllm_adaskip.lab.bench.engines import decode, engine, following
from vllm_adaskip.lab.bench.rounds import Run, take_turns
from vllm_adaskip.lab.evaluation.results import StepTime

STOCK, DENSE = "stock", "dense"
#: Batch sizes that are timed; the last one decides.
BATCHES = (1, 16)
#: Decode steps of a round, of which the median counts, and tokens of each prompt.
STEPS, PROMPT = 12, 32


class Engines:
    """Stock vLLM and ours in this process, compiled as vLLM is by default; started when asked for.

    Args:
        stack: closes them.
        model: folder or hub id.
        options: vLLM's.

    """

    def __init__(self, stack: ExitStack, model: str, **options: Any) -> None:
        self._stack, self._model, self._options = stack, model, options
        self._started: dict[bool, Any] = {}

    def start(self, *, ours: bool) -> Any:
        """Return vLLM's ``LLM``."""
        if ours not in self._started:
            plugin: dict[str, Any] | None = {} if ours else None
            one = engine(self._model, plugin=plugin, load_format="auto", **self._options)
            self._started[ours] = self._stack.enter_context(one)
        return self._started[ours]


@contextmanager
def engines(model: str, **options: Any) -> Iterator[Engines]:
    """Shut down at the end what was started."""
    with ExitStack() as stack:
        yield Engines(stack, model, **options)


@dataclass(frozen=True)
class Shape:
    """What a decode step of one batch size takes, in seconds.

    Attributes:
        stock: of compiled stock vLLM.
        planned: under a plan that leaves out nothing, if there were one: uncompiled.
        attention: what each attention that is left out saves.
        mlp: the same of an MLP.

    """

    stock: float
    planned: float
    attention: float
    mlp: float

    def saved(self, plan: SkipPlan) -> float:
        """Predict what a plan saves of a planned step."""
        return plan.attention.bit_count() * self.attention + plan.mlp.bit_count() * self.mlp

    def ratio(self, plan: SkipPlan) -> float:
        """Predict a plan's time against stock vLLM."""
        return (self.planned - self.saved(plan)) / self.stock


def shape_plans(num_layers: int) -> list[SkipPlan]:
    """Return the plans of which `shape_of` is reckoned: one sub-layer, and half of each kind."""
    half = [*range(0, num_layers, 2)]
    kinds = [[f"{kind}:{layer}" for layer in half] for kind in ("attn", "mlp")]
    return [SkipPlan.parse(one, num_layers) for one in (["attn:0"], *kinds, half)]


def shape_of(times: Mapping[str, StepTime], plans: Sequence[SkipPlan]) -> Shape:
    """Fit the fixed price and both savings to the plans' median times (least squares)."""
    middles = [statistics.median(times[str(plan)].seconds) for plan in plans]
    left_out = [[1, -plan.attention.bit_count(), -plan.mlp.bit_count()] for plan in plans]
    (planned, attention, mlp), *_ = np.linalg.lstsq(np.array(left_out), np.array(middles))
    stock = statistics.median(times[STOCK].seconds)
    return Shape(stock, float(planned), float(attention), float(mlp))


def timed(
    engines: Engines,
    stage: str,
    plans: Sequence[SkipPlan],
    batch: int,
    rounds: int,
    done: Callable[[], None],
) -> list[StepTime]:
    """Time stock vLLM, ours dense and ours under each plan, round by round in turn."""
    stock, ours = engines.start(ours=False), engines.start(ours=True)
    variants: dict[str, Run] = {
        STOCK: partial(_step, stock, [None] * batch),
        DENSE: partial(_step, ours, [None] * batch),
        **{str(plan): partial(_step, ours, following([plan] * batch)) for plan in plans},
    }
    taken = take_turns(variants, rounds, done)
    return [
        StepTime(stage=stage, variant=name, batch=batch, seconds=seconds)
        for name, seconds in taken.items()
    ]


def _step(llm: Any, arguments: Any) -> float:
    return statistics.median(decode(llm, arguments, STEPS, prompt=PROMPT))
