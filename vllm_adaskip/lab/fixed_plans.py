# SPDX-License-Identifier: Apache-2.0
"""Fixed plans that look at nothing, no prompt and no weight: what all others have to beat."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Literal, TypeVar

#: One part of a plan as `SkipPlan.parse` reads it: a layer, or a layer's attention or MLP.
Entry = int | str
Unit = Literal["layer", "attention", "mlp", "sub-layer"]

_FORMS: dict[Unit, tuple[str, ...]] = {
    "attention": ("attn:{}",),
    "mlp": ("mlp:{}",),
    "sub-layer": ("attn:{}", "mlp:{}"),
}
T = TypeVar("T")


def units(unit: Unit, layers: Iterable[int]) -> list[Entry]:
    """Return what of these layers may be left out one by one, in running order."""
    if unit == "layer":
        return [*layers]
    return [form.format(layer) for layer in layers for form in _FORMS[unit]]


def evenly(candidates: Sequence[T], count: int) -> list[T]:
    """Choose candidates in even steps (Unified Layer Skipping, arXiv 2404.06954).

    A step of an even number of sub-layers meets attention only, or MLPs only.
    """
    size = len(candidates)
    return [candidates[(2 * index + 1) * size // (2 * count)] for index in range(count)]


def at_random(candidates: Sequence[T], count: int, seed: int) -> list[T]:
    """Choose any candidates, in running order; the same for a seed."""
    places = random.Random(seed).sample(range(len(candidates)), count)
    return [candidates[place] for place in sorted(places)]


def latest(candidates: Sequence[T], count: int) -> list[T]:
    """Choose the last candidates (for attention: arXiv 2407.15516)."""
    return [*candidates[len(candidates) - count :]]
