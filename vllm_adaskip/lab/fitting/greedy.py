# SPDX-License-Identifier: Apache-2.0
"""The greedy search for what a model misses least (SLEB, arXiv 2402.09025, for layers)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Step(Generic[T]):
    """One candidate left out besides those of the steps before.

    Attributes:
        left_out: all so far, in this order.
        loss: without them.

    """

    left_out: tuple[T, ...]
    loss: float


def greedy(
    loss: Callable[[tuple[T, ...]], float], candidates: Sequence[T], steps: int
) -> Iterator[Step[T]]:
    """Leave out, at each step, the candidate without which the loss is least.

    No set is searched for as a whole, so two candidates that can only go together may both stay.

    Args:
        loss: asked once for each candidate that is left, at each step.
        candidates: of equal losses the first goes.
        steps: at most so many go.

    """
    left = list(candidates)
    left_out: tuple[T, ...] = ()
    for _ in range(min(steps, len(left))):
        tried = [Step(tried, loss(tried)) for tried in ((*left_out, one) for one in left)]
        best = min(tried, key=_rank)
        yield best
        left_out = best.left_out
        left.remove(left_out[-1])


def trials(candidates: int, steps: int) -> int:
    """Count the losses that `greedy` asks for."""
    return sum(candidates - step for step in range(min(steps, candidates)))


def _rank(step: Step[T]) -> tuple[bool, float]:
    """Put last what overflowed: a loss that is no number compares with nothing."""
    return isnan(step.loss), step.loss
