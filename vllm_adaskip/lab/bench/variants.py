# SPDX-License-Identifier: Apache-2.0
"""The engines that are timed side by side, and what each of them runs."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_adaskip.classifiers import SkipPlan
from vllm_adaskip.lab.bench.bound import nearly_dense
from vllm_adaskip.lab.bench.engines import Arguments, decode, engine, following, untrained_first
from vllm_adaskip.lab.bench.machine import memory_available
from vllm_adaskip.lab.bench.plans import deal, distinct, shared, two_left_out
from vllm_adaskip.lab.bench.rounds import Run
from vllm_adaskip.lab.bench.shapes import Shape
from vllm_adaskip.lab.bench.work import Work

#: Distinct plans in one batch.
MIXTURES = (2, 4, 8, 64)
STOCK, CONTROL, OFF = "stock vLLM", "stock vLLM once more", "plugin, nothing skipped"
EAGER = "stock vLLM, eager"
ONE, SMALLER = "one plan for all", "layers physically gone"
NEARLY, DECIDED = "all but one layer", "decided at prefill, drawn together"
TWO = "two layers left out"
GUARDED, GUARDED_HALF = "a little by prompt, guarded", "half by prompt, guarded"

#: Announces some work and in how many turns it comes; gives what to call after each of them.
Say = Callable[[str, int], Callable[[], None]]


def mixed(count: int) -> str:
    """Name the variant with so many plans."""
    return f"{count} plans mixed" if count > 1 else ONE


@dataclass(frozen=True)
class Effort:
    """How much is timed.

    Attributes:
        steps: decode steps of each batch, of which the median counts.
        rounds: turns of each variant.
        turns: of each breakdown, and of each engine's memory.
        prompts: sequences that are prefilled together.
        context: tokens before a decode step.
        prompt_tokens: of each prompt that is timed.

    """

    steps: int
    rounds: int
    turns: int
    prompts: int
    context: int = 8
    prompt_tokens: int = 240


@dataclass(frozen=True)
class Engines:
    """Engines of one shape, all in this process.

    Attributes:
        shape: of the model.
        model: its folder.
        stock: stock vLLM, compiled, as all but the next.
        eager: stock vLLM with ``enforce_eager``.
        plugin: with the plugin; plans come with the requests, `ONE` and `TWO` are known to it.
        smaller: stock vLLM with half of the layers physically gone.
        guarded: the plugin with `adaskip`, a plan for each prompt, and ``guard``.
        first: the plugin with FiRST, which decides on half of the layers, ``coalesce_regret`` 1.

    The last two are None where memory is short, or with adapters: those engines run uncompiled,
    and ``guard`` measures none.

    """

    shape: Shape
    model: str
    stock: Any
    eager: Any
    plugin: Any
    smaller: Any
    guarded: Any = None
    first: Any = None

    @classmethod
    @contextmanager
    def started(cls, shape: Shape, folder: Path, say: Say) -> Iterator[Engines]:
        """Start them; what they load is written into a folder."""
        model = shape.write(folder / "whole")
        kept = shape.num_layers - shared(shape.num_layers).attention.bit_count()
        half = shape.of_depth(kept).write(folder / "half")
        first = {
            "profile": untrained_first(folder / "first", model),
            "max_compute": 0.5,
            "coalesce_regret": 1.0,
        }
        layers = shape.num_layers
        known = [one.entries() for one in (shared(layers), two_left_out(layers))]
        wanted: tuple[tuple[str, dict[str, Any] | None, bool], ...]
        wanted = (
            (model, None, False),
            (model, None, True),
            (model, {"known_plans": known}, False),
            (half, None, False),
            (model, {"method": "adaskip", "guard": True}, False),
            (model, first, False),
        )
        gc.collect()  # what earlier engines hold goes only with them
        most = 0 if shape.adapters else int(memory_available() / memory_of(shape))
        wanted = wanted[: max(4, most)]
        started = say(f"{shape.name}: starting engines", len(wanted))
        with ExitStack() as stack:
            engines = []
            for path_, plugin, eager in wanted:
                one = engine(path_, plugin=plugin, enforce_eager=eager)
                engines.append(stack.enter_context(one))
                started()
            yield cls(shape, model, *engines)

    def plans(self, batch: int) -> dict[str, list[SkipPlan]]:
        """Return the rows' plans of each variant that brings its own; all but ``OFF`` skip."""
        layers = self.shape.num_layers
        mixtures = {
            mixed(count): deal(distinct(layers, count), batch)
            for count in MIXTURES
            if count <= batch
        }
        return {
            OFF: [SkipPlan(layers)] * batch,
            ONE: [shared(layers)] * batch,
            **mixtures,
            TWO: [two_left_out(layers)] * batch,
            NEARLY: [nearly_dense(layers)] * batch,
        }

    def decoding(self, batch: int, effort: Effort) -> dict[str, Run]:
        """Return what each variant runs at a batch size: seconds of a decode step."""
        nothing: Arguments = [None] * batch
        variants = {
            STOCK: (self.stock, nothing),
            CONTROL: (self.stock, nothing),
            EAGER: (self.eager, nothing),
            SMALLER: (self.smaller, nothing),
            **{name: (self.plugin, following(plans)) for name, plans in self.plans(batch).items()},
            GUARDED: (self.guarded, [{"adaskip_max_compute": 0.95}] * batch),
            GUARDED_HALF: (self.guarded, [{"adaskip_max_compute": 0.5}] * batch),
            DECIDED: (self.first, nothing),
        }
        return {
            name: stepping(llm, arguments, effort)
            for name, (llm, arguments) in variants.items()
            if llm is not None
        }


def memory_of(shape: Shape) -> float:
    """Estimate the bytes of an engine: weights, a GiB of KV cache, half of one for the compiler."""
    dense = Work.of(shape, [SkipPlan(shape.num_layers)], 0)
    return dense.weight_bytes + 1.5 * (1 << 30)


def stepping(llm: Any, arguments: Arguments, effort: Effort) -> Run:
    """Return what times a decode step of a batch."""
    return lambda: statistics.median(decode(llm, arguments, effort.steps, prompt=effort.context))
