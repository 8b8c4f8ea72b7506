# SPDX-License-Identifier: Apache-2.0
"""How the host's work on a step grows with layers, sequences and distinct plans."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from vllm_adaskip.engine.step import Step
from vllm_adaskip.lab.bench.plans import deal, distinct

#: What grows -> its sizes; the others stay at `_BASE`.
SIZES = {
    "layers": (12, 24, 48, 96),
    "sequences": (64, 128, 256, 512, 1024),
    "distinct plans": (1, 4, 16, 64, 256),
}
_BASE = {"layers": 32, "sequences": 256, "distinct plans": 64}
_TURNS = 15


@dataclass(frozen=True)
class Curve:
    """Seconds that planning a step takes, by the size of one thing.

    Attributes:
        what: grows.
        seconds: size -> the least of several turns.
        exponent: of the power that fits best; 1 is linear.

    """

    what: str
    seconds: dict[int, float]
    exponent: float


def curves() -> list[Curve]:
    """Measure all of them."""
    found = []
    for what, sizes in SIZES.items():
        seconds = {size: _planned({**_BASE, what: size}) for size in sizes}
        slope, _ = np.polyfit(np.log(list(seconds)), np.log(list(seconds.values())), 1)
        found.append(Curve(what, seconds, float(slope)))
    return found


def _planned(size: dict[str, int]) -> float:
    """Return the least seconds of making a step and its parts."""
    rows = size["sequences"]
    plans = deal(distinct(size["layers"], size["distinct plans"]), rows)
    skips = np.array([plan.mask() for plan in plans])
    ones = np.ones(rows, dtype=np.int64)
    starts, lengths = np.arange(rows + 1), 2 * ones
    taken = []
    for _ in range(_TURNS):
        start = time.perf_counter()
        step = Step.of(starts, lengths, ones, skips)
        for sub_layer in range(skips.shape[1]):
            step.part(sub_layer)
        taken.append(time.perf_counter() - start)
    return min(taken)
