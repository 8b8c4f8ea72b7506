# SPDX-License-Identifier: Apache-2.0
"""The benchmark that ``adaskip bench`` runs for one shape of model.

Four engines in this process take turns: stock vLLM, the plugin, stock vLLM with half of the layers
physically gone, and the plugin with a method that decides at prefill and lets plans coincide.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vllm_adaskip.bench import bound, crossover
from vllm_adaskip.bench.breakdown import ADDED, breakdown
from vllm_adaskip.bench.engines import Arguments, Batch, decode, engine, following
from vllm_adaskip.bench.machine import Machine
from vllm_adaskip.bench.memory import resident
from vllm_adaskip.bench.plans import deal, distinct, shared
from vllm_adaskip.bench.profiles import untrained_first
from vllm_adaskip.bench.results import Results, Target, Timing
from vllm_adaskip.bench.rounds import Run, Spread, Taken, ratio, take_turns
from vllm_adaskip.bench.shapes import Shape
from vllm_adaskip.bench.work import Work
from vllm_adaskip.classifiers import SkipPlan

#: Distinct plans in one batch.
MIXTURES = (2, 4, 8, 64)
STOCK, CONTROL, OFF = "stock vLLM", "stock vLLM once more", "plugin, nothing skipped"
ONE, SMALLER = "one plan for all", "layers physically gone"
NEARLY, DECIDED = "all but one layer", "decided at prefill, coalesce 1"


def mixed(count: int) -> str:
    """Name the variant with so many plans."""
    return f"{count} plans mixed"


@dataclass(frozen=True)
class Effort:
    """How much is timed: decode steps of each batch, rounds, prompt tokens, sequences prefilled."""

    steps: int
    rounds: int
    prompts: int
    context: int = 8
    prompt_tokens: int = 240


class Suite:
    """Times one shape and adds to results; ``say`` is told what comes, and how many turns."""

    def __init__(
        self,
        shape: Shape,
        results: Results,
        effort: Effort,
        batches: Sequence[int],
        say: Callable[[str, int], Callable[[], None]],
    ) -> None:
        self.shape = shape
        self.results = results
        self.effort = effort
        self.batches = batches
        self._say = say

    def run(self, folder: Path) -> None:
        """Time everything; configs are written into a folder."""
        with self._engines(folder):
            for batch in self.batches:
                self._decode(batch)
            self._prefill()
            self._breakdown(max(self.batches))
        self._memory()

    @contextmanager
    def _engines(self, folder: Path) -> Iterator[None]:
        started = self._say(f"{self.shape.name}: starting engines", 5)
        self._whole = whole = self.shape.write(folder / "whole")
        half = self.shape.of_depth(self.shape.num_layers - self._skipped).write(folder / "half")
        first = untrained_first(folder / "first", whole)
        table = self._crossover(whole, folder / "crossover.json")
        started()
        with ExitStack() as stack:

            def start(model: str, plugin: dict[str, Any] | None) -> Any:
                llm = stack.enter_context(engine(model, plugin=plugin))
                started()
                return llm

            self._stock = start(whole, None)
            self._plugin = start(whole, {"crossover": table})
            self._smaller = start(half, None)
            decided = {"profile": first, "budget": 0.5, "crossover": table}
            self._first = start(whole, decided)
            yield

    @property
    def _skipped(self) -> int:
        return shared(self.shape.num_layers).attention.bit_count()

    def _crossover(self, model: str, path: Path) -> str:
        sizes = tuple(size for size in crossover.SIZES if size <= max(self.batches))
        measured = {}
        done = self._say(f"{self.shape.name}: when to run a sub-layer for all", len(sizes))
        with engine(model, plugin={}) as llm:
            for size, times in crossover.measure(llm, sizes, steps=3 * self.effort.steps):
                measured[size] = times
                done()
        table = crossover.crossover(measured)
        path.write_text(table.model_dump_json())
        self.results.crossovers[self.shape.name] = table.model_dump()
        return str(path)

    def _decode(self, batch: int) -> None:
        """Time decode steps of one batch size, and judge them."""
        layers, rounds = self.shape.num_layers, self.effort.rounds
        dense = [SkipPlan(layers)] * batch
        one = [shared(layers)] * batch
        mixtures = {
            mixed(count): deal(distinct(layers, count), batch)
            for count in MIXTURES
            if count <= batch
        }
        plans = {OFF: dense, ONE: one, **mixtures, NEARLY: [bound.nearly_dense(layers)] * batch}
        variants: dict[str, Run] = {
            STOCK: self._run(self._stock, [None] * batch),
            CONTROL: self._run(self._stock, [None] * batch),
            SMALLER: self._run(self._smaller, [None] * batch),
            **{name: self._run(self._plugin, following(plans[name])) for name in plans},
            DECIDED: self._run(self._first, [None] * batch),
        }
        name = f"{self.shape.name}: decode, batch {batch}"
        taken = take_turns(variants, rounds, self._say(name, len(variants) * (rounds + 1)))
        known = {**plans, STOCK: dense, CONTROL: dense, SMALLER: one, DECIDED: one}
        self._keep(f"decode, batch {batch}", taken, known)
        self._promise(f"nothing skipped, decode, batch {batch}", 0.99, ratio(taken, STOCK, OFF))
        self._promise(
            f"one plan against layers gone, batch {batch}", 0.97, ratio(taken, SMALLER, ONE)
        )
        if mixtures:
            self._judge_mixtures(batch, taken, mixtures)
        if batch == 64:
            name = "half skippable, coalesce 1, against dense, batch 64"
            self._promise(name, 1.5, ratio(taken, STOCK, DECIDED))

    def _judge_mixtures(
        self, batch: int, taken: Taken, mixtures: dict[str, list[SkipPlan]]
    ) -> None:
        """Compare steps of mixed plans with the sum of each layer's time at its rows."""
        layers = self.shape.num_layers
        rows = [one for one in bound.all_rows(mixtures.values()) if one != batch]
        variants: dict[tuple[int, str], Run] = {}
        for one in rows:
            for name, plan in (
                (NEARLY, bound.nearly_dense(layers)),
                (ONE, shared(layers)),
            ):
                variants[one, name] = self._run(self._plugin, following([plan] * one))
        named = {f"{name}, {one} rows": run for (one, name), run in variants.items()}
        rounds = max(2, self.effort.rounds // 2)
        said = f"{self.shape.name}: layers at other rows than {batch}"
        parts = take_turns(named, rounds, self._say(said, len(named) * (rounds + 1)))
        middle = {name: statistics.median(seconds) for name, seconds in {**taken, **parts}.items()}
        layer = {
            one: bound.layer_seconds(
                middle[f"{NEARLY}, {one} rows"], middle[f"{ONE}, {one} rows"], layers
            )
            for one in rows
        }
        layer[batch] = bound.layer_seconds(middle[NEARLY], middle[ONE], layers)
        for name, plans in mixtures.items():
            least = bound.bound(plans, middle[NEARLY], layer)
            reached = Spread.of([least / seconds for seconds in taken[name]])
            self._promise(f"{name}, of the bound, batch {batch}", 0.90, reached)

    def _prefill(self) -> None:
        """Time prompts up to their first token."""
        effort, layers = self.effort, self.shape.num_layers
        for prompts in sorted({1, effort.prompts}):
            engines = {
                STOCK: self._stock,
                CONTROL: self._stock,
                OFF: self._plugin,
                DECIDED: self._first,
            }
            variants = {
                name: partial(first_tokens, llm, prompts, effort.prompt_tokens)
                for name, llm in engines.items()
            }
            case = f"prefill, {prompts} of {effort.prompt_tokens} tokens"
            total = len(variants) * (effort.rounds + 1)
            said = self._say(f"{self.shape.name}: {case}", total)
            taken = take_turns(variants, effort.rounds, said)
            self._keep(case, taken, {})
            self._promise(f"nothing skipped, {case}", 0.99, ratio(taken, STOCK, OFF))
            self._promise(f"first token with FiRST, {case}", 0.99, ratio(taken, STOCK, DECIDED))
        assert layers

    def _breakdown(self, batch: int) -> None:
        layers, steps = self.shape.num_layers, 5 * self.effort.steps
        cases = {count: deal(distinct(layers, count), batch) for count in (1, *MIXTURES)}
        cases = {count: plans for count, plans in cases.items() if count <= batch}
        done = self._say(f"{self.shape.name}: where a step's time goes", 3 * len(cases))
        found: dict[str, dict[str, float]] = {}
        shares: dict[int, list[float]] = {}
        for count, plans in cases.items():
            turns = []
            for _ in range(3):
                turns.append(breakdown(self._plugin, following(plans), steps))
                done()
            shares[count] = [host_share(turn) for turn in turns]
            found[f"{mixed(count)}, batch {batch}"] = {
                part: statistics.median(turn[part] for turn in turns) for part in turns[0]
            }
        self.results.breakdowns[self.shape.name] = found
        if 64 in shares:
            name = "64 distinct plans, host time of a step, batch 64"
            self._promise(name, 0.05, Spread.of(shares[64]), is_most=True)

    def _memory(self) -> None:
        done = self._say(f"{self.shape.name}: resident memory", 6)
        more = []
        for _ in range(3):
            sizes = []
            for plugin in (False, True):
                sizes.append(resident(self._whole, plugin=plugin))
                done()
            more.append(sizes[1] / sizes[0] - 1)
        self._promise("memory above stock vLLM", 0.02, Spread.of(more), is_most=True)

    def _run(self, llm: Any, arguments: Arguments) -> Run:
        return lambda: statistics.median(
            decode(llm, arguments, self.effort.steps, prompt=self.effort.context)
        )

    def _keep(self, case: str, taken: Taken, plans: dict[str, list[SkipPlan]]) -> None:
        for name, seconds in taken.items():
            roof = None
            if name in plans:
                context = self.effort.context + self.effort.steps // 2
                work = Work.of(self.shape, plans[name], context)
                num_bytes = work.weight_bytes + work.kv_bytes
                roof = self.results.machine.seconds(num_bytes, work.operations)
            self.results.timings.append(
                Timing(
                    self.shape.name,
                    case,
                    name,
                    Spread.of(seconds),
                    ratio(taken, STOCK, name),
                    roof,
                )
            )

    def _promise(self, name: str, wanted: float, found: Spread, *, is_most: bool = False) -> None:
        self.results.targets.append(Target(self.shape.name, name, wanted, found, is_most))


def first_tokens(llm: Any, prompts: int, tokens: int) -> float:
    """Give the seconds until each of so many prompts has its first token."""
    batch = Batch(llm, [None] * prompts, prompt=tokens, tokens=1)
    seconds = batch.prefill()
    batch.end()
    return seconds


def host_share(parts: dict[str, float]) -> float:
    """Give the share of a step that goes into arranging it: table, step plan, metadata, loop."""
    arranging = (part for part in ADDED if part not in ("gather and scatter", "fill"))
    return sum(parts[part] for part in arranging) / sum(parts.values())


__all__ = ["Effort", "Machine", "Suite"]
