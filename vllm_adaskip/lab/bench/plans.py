# SPDX-License-Identifier: Apache-2.0
"""Plans that a benchmark deals out."""

from __future__ import annotations

import random
from itertools import cycle, islice
from math import comb

from vllm_adaskip.classifiers import SkipPlan
from vllm_adaskip.lab.fixed_plans import Unit, at_random, evenly, units


def shared(num_layers: int, share: float = 0.5, unit: Unit = "layer") -> SkipPlan:
    """Return a plan that leaves out a share of all layers, or of attention or MLPs, evenly."""
    candidates = units(unit, range(num_layers))
    return SkipPlan.parse(evenly(candidates, round(share * len(candidates))), num_layers)


def two_left_out(num_layers: int) -> SkipPlan:
    """Return a plan that leaves out two layers, a third and two thirds up."""
    return SkipPlan.parse([num_layers // 3, 2 * num_layers // 3], num_layers)


def distinct(
    num_layers: int, count: int, share: float = 0.5, unit: Unit = "layer"
) -> list[SkipPlan]:
    """Return as many plans, all different, that leave out as much; the same at every call.

    Raises:
        ValueError: there are not so many.

    """
    candidates = units(unit, range(num_layers))
    skipped = round(share * len(candidates))
    if count > comb(len(candidates), skipped):
        raise ValueError(
            f"there are no {count} plans without {skipped} of {len(candidates)} of the model's "
            f"{unit}s; allowed: up to {comb(len(candidates), skipped)}"
        )
    draw, found = random.Random(0), dict[SkipPlan, None]()
    while len(found) < count:
        drawn = at_random(candidates, skipped, draw.getrandbits(32))
        found[SkipPlan.parse(drawn, num_layers)] = None
    return list(found)


def deal(plans: list[SkipPlan], rows: int) -> list[SkipPlan]:
    """Return one of the plans for each row of a batch, in turn."""
    return list(islice(cycle(plans), rows))
