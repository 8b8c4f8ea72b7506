# SPDX-License-Identifier: Apache-2.0
"""A scan from start to end; what was measured is stored at once, and not measured again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from vllm_adaskip.classifiers.plan import DecoderShape, SkipPlan
from vllm_adaskip.lab.data.items import Item
from vllm_adaskip.lab.evaluation.results import PlanReading, Results, StepTime, WholeAnswer
from vllm_adaskip.lab.fixed_plans import Entry, Unit, units
from vllm_adaskip.lab.scan import answers as asking
from vllm_adaskip.lab.scan import prompts as shortening
from vllm_adaskip.lab.scan import timing
from vllm_adaskip.lab.scan.judge import How, Judge
from vllm_adaskip.lab.scan.order import TRIED, baselines, lazy_greedy, sizes
from vllm_adaskip.lab.scan.prompts import Prompts
from vllm_adaskip.lab.scan.verdict import (
    Confirmed,
    Verdict,
    against_baselines,
    confirmed,
    verdict,
)

#: The search ends where less of the tokens stay the whole model's, or so many candidates are gone.
FLOOR, MOST = 0.5, 0.5
#: Announces a phase and how many turns it has at most; returns what to call after each.
Say = Callable[[str, int], Callable[[], None]]
#: Time against stock vLLM and agreement, by family.
Curve = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class Found:
    """What a scan found.

    Attributes:
        num_layers: of the model.
        steps: what a step takes, by batch size.
        saved: seconds of a step at the largest batch size that each candidate saves.
        whole_loss: of the whole model, on the answers of the search.
        singles: each candidate left out alone, on the same answers.
        order: of the candidates, cheapest for their time first.
        curve: of the held-out answers.
        dense: ours with nothing left out.
        plans: what the engine confirmed.
        verdict: on these.
        prompts: of shortened prompts; None: nobody asked.

    """

    num_layers: int
    steps: dict[int, timing.Shape]
    saved: dict[Entry, float]
    whole_loss: float
    singles: dict[Entry, PlanReading]
    order: tuple[Entry, ...]
    curve: Curve
    dense: Confirmed
    plans: list[Confirmed]
    verdict: Verdict
    prompts: Prompts | None = None


class Scan:
    """One scan.

    Args:
        results: folder with its manifest.
        load: returns the transformers model.
        shape: of the model.
        engines: of vLLM.
        unit: what is left out one by one.
        rounds: of each timing.
        tokens: of an answer, at most.
        say: is told of each phase.

    """

    def __init__(
        self,
        results: Results,
        load: Callable[[], Any],
        shape: DecoderShape,
        engines: timing.Engines,
        *,
        unit: Unit,
        rounds: int,
        tokens: int,
        say: Say,
    ) -> None:
        self._results, self._load, self._shape, self._engines = results, load, shape, engines
        self._rounds, self._tokens, self._say = rounds, tokens, say
        self._unit: Unit = unit
        self._candidates = units(unit, range(shape.num_layers))
        self._judges: dict[How, Judge] = {}
        self._halves: dict[How, list[WholeAnswer]] = {}
        self._known = {(one.how, *one.skip): one for one in results.read(PlanReading)}

    def run(
        self,
        items: Sequence[Item],
        prompts: Sequence[list[int]],
        bound: float,
        exits: Sequence[int] = (),
    ) -> Found:
        """Measure all that is not measured yet; ``exits``: layers that shortened prompts run."""
        searched, held_out = asking.halves(self._whole(items, prompts))
        self._halves = {"search": searched, "held out": held_out}
        plans = timing.shape_plans(self._shape.num_layers)
        steps = {
            batch: timing.shape_of({one.variant: one for one in times}, plans)
            for batch, times in self._times("step", plans).items()
        }
        deciding = steps[max(timing.BATCHES)]
        saved = {one: deciding.saved(self._plan((one,))) for one in self._candidates}
        order = self._search("an order", saved)
        curve = self._curve(order, deciding)
        dense, *tried = self._confirm(self._worth_trying(order, bound))
        tokens = sum(len(one.answer) - 1 for one in held_out)
        found = verdict(dense, tried, bound, deciding, tokens)
        doubts = [*found.doubts, *against_baselines(curve)]
        return Found(
            num_layers=self._shape.num_layers,
            steps=steps,
            saved=saved,
            whole_loss=self._reading("search", ()).loss or 0.0,
            singles={one: self._reading("search", (one,)) for one in self._candidates},
            order=order,
            curve=curve,
            dense=dense,
            plans=tried,
            verdict=replace(found, doubts=doubts),
            prompts=self._prompts(exits, bound) if exits else None,
        )

    def _prompts(self, exits: Sequence[int], bound: float) -> Prompts:
        return shortening.measured(
            self._results, self._engines, self._halves["held out"], exits, self._shape, bound,
            rounds=self._rounds, tokens=self._tokens, say=self._say,
        )  # fmt: skip

    @cached_property
    def _model(self) -> Any:
        return self._load()

    def _plan(self, entries: Sequence[Entry]) -> SkipPlan:
        return SkipPlan.parse([*entries], self._shape.num_layers)

    def _whole(self, items: Sequence[Item], prompts: Sequence[list[int]]) -> list[WholeAnswer]:
        if known := self._results.read(WholeAnswer):
            return known
        done = self._say("the whole model answers", 1)
        llm = self._engines.ours(timing.shape_plans(self._shape.num_layers))
        made = asking.whole_answers(llm, items, prompts, self._tokens)
        self._results.append(made)
        done()
        return made

    def _times(self, stage: str, plans: Sequence[SkipPlan]) -> dict[int, list[StepTime]]:
        """Time plans at each batch size, or return what an earlier run timed."""
        return timing.known_or_timed(
            self._results,
            stage,
            {timing.STOCK, timing.DENSE, *map(str, plans)},
            self._rounds,
            lambda batch, turns: self._say(f"timing {stage}s, batch {batch}", turns),
            lambda batch, done: timing.timed(
                self._engines, stage, plans, batch, self._rounds, done
            ),
        )

    def _reading(self, how: How, entries: Sequence[Entry]) -> PlanReading:
        plan = self._plan(entries)
        key = (how, *plan.entries())
        if key not in self._known:
            if how not in self._judges:
                self._judges[how] = Judge(self._model, self._halves[how], how)
            self._known[key] = self._judges[how].read(plan)
            self._results.append([self._known[key]])
        return self._known[key]

    def _agreement(self, how: How, entries: Sequence[Entry]) -> float:
        return float(np.mean(self._reading(how, entries).agreement))

    def _search(self, what: str, saved: Mapping[Entry, float]) -> tuple[Entry, ...]:
        """Return candidates in the order in which they go, until too little is left."""
        most = max(1, int(MOST * len(saved)))
        done = self._say(f"searching for {what}", 1 + len(saved) + most * TRIED)

        def loss(entries: tuple[Entry, ...]) -> float:
            found = self._reading("search", entries).loss
            done()
            assert found is not None
            return found

        left_out: tuple[Entry, ...] = ()
        for step in lazy_greedy(loss, saved):
            left_out = step.left_out
            if len(left_out) >= most or self._agreement("search", left_out) < FLOOR:
                break
        return left_out

    def _families(self, order: tuple[Entry, ...]) -> Iterator[tuple[str, Sequence[Entry]]]:
        """Return the plans of the curve, with their families."""
        for size in sizes(len(order)):
            yield "greedy", order[:size]
            for name, entries in baselines(self._candidates, size).items():
                yield name.partition(" ")[0], entries
        if self._unit != "layer":  # where it is the same search
            layers = units("layer", range(self._shape.num_layers))
            found = self._search("layers as SLEB does", dict.fromkeys(layers, 1.0))
            yield from (("SLEB", found[:size]) for size in sizes(len(found)))

    def _curve(self, order: tuple[Entry, ...], step: timing.Shape) -> Curve:
        plans = [*self._families(order)]
        done = self._say("reading held-out answers under plans", len(plans))
        curve: Curve = {}
        for family, entries in plans:
            point = step.ratio(self._plan(entries)), self._agreement("held out", entries)
            curve.setdefault(family, []).append(point)
            done()
        return curve

    def _worth_trying(self, order: tuple[Entry, ...], bound: float) -> list[SkipPlan]:
        """Return the longest beginning of the order that keeps enough, and its neighbours."""
        enough = [
            size
            for size in range(1, len(order) + 1)
            if self._agreement("search", order[:size]) >= bound
        ]
        size = max(enough, default=1)
        near = {max(1, round(0.75 * size)), size, min(len(order), round(1.25 * size))}
        return [self._plan(order[:one]) for one in sorted(near)]

    def _confirm(self, plans: Sequence[SkipPlan]) -> list[Confirmed]:
        """Have the engine answer under these plans and dense, and time them."""
        asked = [self._plan(()), *plans]
        done = self._say("answering under plans", len(asked))
        readings = []
        for plan in asked:
            key = ("answered", *plan.entries())
            if key not in self._known:
                llm = self._engines.ours(plans)
                held_out = self._halves["held out"]
                self._known[key] = asking.answered(llm, held_out, plan, self._tokens)
                self._results.append([self._known[key]])
            readings.append(self._known[key])
            done()
        times = [one for batch in self._times("plan", plans).values() for one in batch]
        return confirmed(readings, times, self._shape)
