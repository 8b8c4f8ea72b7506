# SPDX-License-Identifier: Apache-2.0
"""What a decode step takes: compiled stock vLLM, ours dense, and ours under plans.

All layers have the same shape, so two plans say what any plan takes: each attention and each MLP
that is left out saves its part of ours dense. Plans are known when the engine starts, as they are
when a profile is served, so a CPU runs them compiled and a GPU as graphs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from vllm_adaskip.classifiers.plan import SkipPlan
from vllm_adaskip.lab.bench.engines import decode, engine, following
from vllm_adaskip.lab.bench.rounds import Run, take_turns
from vllm_adaskip.lab.evaluation.results import Results, StepTime

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
        self._stock: Any = None
        self._ours: Any = None
        self._close = ExitStack()
        self._options_of_ours: Mapping[str, Any] = {}

    def stock(self) -> Any:
        """Return stock vLLM's ``LLM``."""
        if self._stock is None:
            self._stock = self._stack.enter_context(self._engine())
        return self._stock

    def ours(self, known: Sequence[SkipPlan]) -> Any:
        """Return our ``LLM`` to which these plans are known."""
        return self._with({"known_plans": [plan.entries() for plan in known]})

    def shortening(self, num_layers: int) -> Any:
        """Return our ``LLM``, ready for prompts that are shortened if their request says so."""
        return self._with({"prompt": {"exit": num_layers}})

    def _with(self, options: Mapping[str, Any]) -> Any:
        """Return our ``LLM`` with these options; one with others is closed."""
        if self._ours is None or options != self._options_of_ours:
            self._close.close()
            self._close = self._stack.enter_context(ExitStack())
            self._ours = self._close.enter_context(self._engine(plugin=options))
            self._options_of_ours = options
        return self._ours

    def _engine(self, **more: Any) -> Any:
        return engine(self._model, load_format="auto", **more, **self._options)


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
        dense: of ours with nothing left out.
        attention: what each attention that is left out saves.
        mlp: the same of an MLP.

    """

    stock: float
    dense: float
    attention: float
    mlp: float

    def saved(self, plan: SkipPlan) -> float:
        """Predict what a plan saves of a dense step."""
        return plan.attention.bit_count() * self.attention + plan.mlp.bit_count() * self.mlp

    def ratio(self, plan: SkipPlan) -> float:
        """Predict a plan's time against stock vLLM."""
        return (self.dense - self.saved(plan)) / self.stock


def shape_plans(num_layers: int) -> list[SkipPlan]:
    """Return the plans of which `shape_of` is reckoned: without half of each kind."""
    half = range(0, num_layers, 2)
    kinds = [[f"{kind}:{layer}" for layer in half] for kind in ("attn", "mlp")]
    return [SkipPlan.parse(one, num_layers) for one in kinds]


def shape_of(times: Mapping[str, StepTime], plans: Sequence[SkipPlan]) -> Shape:
    """Reckon what each attention and each MLP saves, of the median times of `shape_plans`."""
    stock, dense, *under = (
        statistics.median(times[name].seconds) for name in (STOCK, DENSE, *map(str, plans))
    )
    attention, mlp = (
        (dense - seconds) / (plan.attention.bit_count() + plan.mlp.bit_count())
        for seconds, plan in zip(under, plans, strict=True)
    )
    return Shape(stock, dense, attention, mlp)


def timed(
    engines: Engines,
    stage: str,
    plans: Sequence[SkipPlan],
    batch: int,
    rounds: int,
    done: Callable[[], None],
) -> list[StepTime]:
    """Time stock vLLM, ours dense and ours under each plan, round by round in turn."""
    stock, ours = engines.stock(), engines.ours(plans)
    variants: dict[str, Run] = {
        STOCK: partial(_step, stock, [None] * batch),
        DENSE: partial(_step, ours, [None] * batch),
        **{str(plan): partial(_step, ours, following([plan] * batch)) for plan in plans},
    }
    return in_turns(stage, variants, batch, rounds, done)


def in_turns(
    stage: str, variants: Mapping[str, Run], batch: int, rounds: int, done: Callable[[], None]
) -> list[StepTime]:
    """Time variants round by round in turn."""
    taken = take_turns(variants, rounds, done)
    return [
        StepTime(stage=stage, variant=name, batch=batch, seconds=seconds)
        for name, seconds in taken.items()
    ]


def known_or_timed(
    results: Results,
    stage: str,
    variants: set[str],
    rounds: int,
    begin: Callable[[int, int], Callable[[], None]],
    time: Callable[[int, Callable[[], None]], list[StepTime]],
) -> dict[int, list[StepTime]]:
    """Return times by batch size: what an earlier run stored, or else what is timed and stored now.

    Args:
        results: of the scan.
        stage: what takes turns in the same rounds.
        variants: all that are wanted.
        rounds: of each.
        begin: is told of a batch size and how many turns it has; returns what to call after each.
        time: times a batch size.

    """
    known = [one for one in results.read(StepTime) if one.stage == stage]
    found = {}
    for batch in BATCHES:
        times = [one for one in known if one.batch == batch and one.variant in variants]
        if {one.variant for one in times} != variants:
            times = time(batch, begin(batch, len(variants) * (rounds + 1)))
            results.append(times)
        found[batch] = times
    return found


def variant_of(plan: SkipPlan) -> str:
    """Return how the times of a plan are called."""
    return DENSE if plan.is_dense else str(plan)


def _step(llm: Any, arguments: Any) -> float:
    return statistics.median(decode(llm, arguments, STEPS, prompt=PROMPT))
