# SPDX-License-Identifier: Apache-2.0
"""Variants that take turns, round by round, so that drift of the machine falls on all."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

#: Does the work of a variant once and gives its seconds.
Run = Callable[[], float]
#: Of each variant, the seconds of every round.
Taken = dict[str, list[float]]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Take at least two values."""
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))

    def __str__(self) -> str:
        """``0.98 (0.97 to 1.00)``."""
        return f"{self.middle:.3f} ({self.low:.3f} to {self.high:.3f})"


def take_turns(variants: Mapping[str, Run], rounds: int, done: Callable[[], None]) -> Taken:
    """Run all variants once a round, forwards and backwards in turn; the first round warms up.

    ``done`` is called after each.
    """
    taken: Taken = {name: [] for name in variants}
    order = list(variants)
    for round_ in range(rounds + 1):
        order.reverse()
        for name in order:
            seconds = variants[name]()
            if round_:
                taken[name].append(seconds)
            done()
    return taken


def ratio(taken: Taken, above: str, below: str) -> Spread:
    """Return the spread of one variant's seconds over another's in the same round."""
    return Spread.of([a / b for a, b in zip(taken[above], taken[below], strict=True)])
