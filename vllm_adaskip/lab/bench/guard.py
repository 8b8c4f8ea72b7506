# SPDX-License-Identifier: Apache-2.0
"""A fast subset of the benchmark whose ratios must not fall: a guard, not a measurement."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from vllm_adaskip.lab.bench.engines import first_tokens
from vllm_adaskip.lab.bench.rounds import Run, Spread, ratio, take_turns
from vllm_adaskip.lab.bench.shapes import Shape
from vllm_adaskip.lab.bench.variants import (
    DECIDED,
    EAGER,
    GUARDED,
    OFF,
    ONE,
    SMALLER,
    STOCK,
    Effort,
    Engines,
    Say,
    mixed,
)

#: Whose time, over whose, at least. Far enough below what is measured that noise does not ring it.
FLOORS = {
    (STOCK, OFF): 0.92,
    (SMALLER, ONE): 0.80,
    (STOCK, ONE): 1.25,
    (EAGER, ONE): 1.70,
    (EAGER, mixed(8)): 1.15,
    (EAGER, mixed(64)): 1.15,
    (EAGER, DECIDED): 1.60,
    (STOCK, GUARDED): 0.85,
    ("first token, stock vLLM", "first token, FiRST"): 0.75,
}
_BATCH = 64
_EFFORT = Effort(steps=12, rounds=5, turns=1, prompts=16)


def guard(folder: Path, say: Say) -> list[tuple[str, float, Spread]]:
    """Return each ratio on the bundled model's shape: what, its floor, what was found."""
    with Engines.started(Shape.of("bundled"), folder, say) as engines:
        wanted = {name for pair in FLOORS for name in pair}
        variants: dict[str, Run] = {
            name: run for name, run in engines.decoding(_BATCH, _EFFORT).items() if name in wanted
        }
        for name, llm in (("stock vLLM", engines.stock), ("FiRST", engines.first)):
            variants[f"first token, {name}"] = partial(
                first_tokens, llm, [None] * _EFFORT.prompts, _EFFORT.prompt_tokens
            )
        done = say("variants in turn", len(variants) * (_EFFORT.rounds + 1))
        taken = take_turns(variants, _EFFORT.rounds, done)
    return [
        (f"{above} / {below}", floor, ratio(taken, above, below))
        for (above, below), floor in FLOORS.items()
    ]
