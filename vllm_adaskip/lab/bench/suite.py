# SPDX-License-Identifier: Apache-2.0
"""The benchmark of one shape of model: times every variant, and judges what is promised."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vllm_adaskip.classifiers import SkipPlan
from vllm_adaskip.lab.bench import bound
from vllm_adaskip.lab.bench.breakdown import breakdown, host_share
from vllm_adaskip.lab.bench.engines import first_tokens, following
from vllm_adaskip.lab.bench.memory import resident
from vllm_adaskip.lab.bench.plans import deal, distinct
from vllm_adaskip.lab.bench.results import Results, Target, Timing
from vllm_adaskip.lab.bench.rounds import Spread, Taken, ratio, take_turns
from vllm_adaskip.lab.bench.shapes import Shape
from vllm_adaskip.lab.bench.variants import (
    CONTROL,
    DECIDED,
    EAGER,
    GUARDED,
    GUARDED_HALF,
    MIXTURES,
    NEARLY,
    OFF,
    ONE,
    SMALLER,
    STOCK,
    TWO,
    Effort,
    Engines,
    Say,
    mixed,
)
from vllm_adaskip.lab.bench.work import Work


class Suite:
    """Times one shape and adds to results."""

    def __init__(
        self, shape: Shape, results: Results, effort: Effort, batches: Sequence[int], say: Say
    ) -> None:
        self.shape = shape
        self.results = results
        self.effort = effort
        self.batches = batches
        self._say = say

    def run(self, folder: Path, *, only_breakdown: bool = False) -> None:
        """Time everything; what engines load is written into a folder."""
        with Engines.started(self.shape, folder, self._say) as engines:
            if not only_breakdown:
                for batch in self.batches:
                    taken = self._decode(engines, batch)
                    self._judge_mixtures(engines, batch, taken)
                # vLLM's CPU kernels gather an adapter for each token: minutes for sixteen prompts.
                for prompts in () if self.shape.adapters else sorted({1, self.effort.prompts}):
                    self._prefill(engines, prompts)
            self._break_down(engines, max(self.batches))
        if not only_breakdown:
            self._compare_memory(engines.model)

    def _decode(self, engines: Engines, batch: int) -> Taken:
        case = f"decode, batch {batch}"
        taken = self._turns(case, engines.decoding(batch, self.effort), self.effort.rounds)
        plans = engines.plans(batch)
        plans |= dict.fromkeys((STOCK, CONTROL, EAGER), plans[OFF])
        plans |= {SMALLER: plans[ONE], DECIDED: plans[ONE]}
        self._keep(case, taken, {name: self._roof(rows) for name, rows in plans.items()})
        self._promise(f"{case}: nothing skipped", 0.99, ratio(taken, STOCK, OFF))
        due = 2 / self.shape.num_layers
        saved = [1 - two / stock for stock, two in zip(taken[STOCK], taken[TWO], strict=True)]
        name = f"{case}: two layers left out, saved of their share of all layers"
        self._promise(name, 0.9, Spread.of([each / due for each in saved]))
        gone = ratio(taken, SMALLER, ONE)
        self._promise(f"{case}: one plan, against layers gone", 0.97, gone)
        for guarded in sorted({GUARDED, GUARDED_HALF} & taken.keys()):
            self._promise(f"{case}: {guarded}", 0.99, ratio(taken, STOCK, guarded))
        if batch == 64 and DECIDED in taken:
            drawn = ratio(taken, STOCK, DECIDED)
            self._promise(f"{case}: half skippable, coalesce, against dense", 1.5, drawn)
        return taken

    def _judge_mixtures(self, engines: Engines, batch: int, taken: Taken) -> None:
        """Compare steps of mixed plans with the sum of each layer's time at its rows."""
        layers = self.shape.num_layers
        mixtures = {
            name: plans
            for name, plans in engines.plans(batch).items()
            if name in map(mixed, MIXTURES)
        }
        if not mixtures:
            return
        rows = bound.all_rows(mixtures.values())
        done = self._say(
            f"{self.shape.name}: a layer at 1 to {batch} rows", self.effort.turns * len(rows)
        )
        layer = {}
        for one in rows:
            turns = []
            for _ in range(self.effort.turns):
                nearly = following([bound.nearly_dense(layers)] * one)
                spent = breakdown(engines.plugin, nearly, self.effort.steps)
                turns.append((spent["attention"] + spent["MLP"]) / (layers - 1))
                done()
            layer[one] = statistics.median(turns)
        whole = statistics.median(taken[NEARLY])
        for name, rows_of in mixtures.items():
            least = bound.bound(rows_of, whole, layer)
            reached = Spread.of([least / seconds for seconds in taken[name]])
            self._promise(f"decode, batch {batch}: {name}, of the bound", 0.90, reached)

    def _prefill(self, engines: Engines, prompts: int) -> None:
        """Time prompts up to their first token."""
        tokens = self.effort.prompt_tokens
        timed = {
            STOCK: engines.stock,
            CONTROL: engines.stock,
            OFF: engines.plugin,
            DECIDED: engines.first,
        }
        case = f"prefill, {prompts} x {tokens} tokens"
        variants = {
            name: partial(first_tokens, llm, [None] * prompts, tokens)
            for name, llm in timed.items()
            if llm is not None
        }
        taken = self._turns(case, variants, self.effort.rounds)
        self._keep(case, taken, {})
        self._promise(f"{case}: nothing skipped", 0.99, ratio(taken, STOCK, OFF))
        if DECIDED in taken:
            self._promise(f"{case}: first token with FiRST", 0.99, ratio(taken, STOCK, DECIDED))

    def _break_down(self, engines: Engines, batch: int) -> None:
        plans = {OFF: [SkipPlan(self.shape.num_layers)]}
        for count in (1, *MIXTURES):
            if count <= batch:
                plans[mixed(count)] = distinct(self.shape.num_layers, count)
        done = self._say(
            f"{self.shape.name}: where a step's time goes", self.effort.turns * len(plans)
        )
        found = self.results.breakdowns.setdefault(self.shape.name, {})
        for case, several in plans.items():
            arguments = following(deal(several, batch))
            turns = []
            for _ in range(self.effort.turns):
                turns.append(breakdown(engines.plugin, arguments, 3 * self.effort.steps))
                done()
            found[f"batch {batch}, {case}"] = {
                part: statistics.median(one[part] for one in turns) for part in turns[0]
            }
            if len(several) == 64:
                shares = Spread.of([host_share(one) for one in turns])
                name = f"decode, batch {batch}: 64 plans, host time of a step"
                self._promise(name, 0.05, shares, is_most=True)

    def _compare_memory(self, model: str) -> None:
        done = self._say(f"{self.shape.name}: resident memory", 2 * self.effort.turns)
        more = []
        for _ in range(self.effort.turns):
            sizes = []
            for plugin in (False, True):
                sizes.append(resident(model, plugin=plugin))
                done()
            more.append(sizes[1] / sizes[0] - 1)
        self._promise("memory above stock vLLM", 0.02, Spread.of(more), is_most=True)

    def _turns(self, case: str, variants: dict[str, Any], rounds: int) -> Taken:
        done = self._say(f"{self.shape.name}: {case}", len(variants) * (rounds + 1))
        return take_turns(variants, rounds, done)

    def _roof(self, plans: Sequence[SkipPlan]) -> float | None:
        """Return the least seconds of a step; None where other than bfloat16 weights are read."""
        if self.shape.adapters or self.shape.config.get("quantization_config"):
            return None
        work = Work.of(self.shape, plans, self.effort.context + self.effort.steps // 2)
        return self.results.machine.seconds(work.weight_bytes + work.kv_bytes, work.operations)

    def _keep(self, case: str, taken: Taken, roofs: dict[str, float | None]) -> None:
        for name, seconds in taken.items():
            against = ratio(taken, STOCK, name)
            timing = Timing(
                self.shape.name, case, name, Spread.of(seconds), against, roofs.get(name)
            )
            self.results.timings.append(timing)

    def _promise(self, name: str, wanted: float, found: Spread, *, is_most: bool = False) -> None:
        self.results.targets.append(Target(self.shape.name, name, wanted, found, is_most))
