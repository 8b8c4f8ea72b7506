# SPDX-License-Identifier: Apache-2.0
"""In which order sub-layers may go: by what each costs for the time that it saves.

Lazy greedy: the price of a candidate that was measured with fewer left out is an estimate. At each
step only the `TRIED` candidates that seem cheapest are measured again, and the cheapest of them
goes. A full search would measure all that are left at each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from vllm_adaskip.lab.fitting.greedy import Step
from vllm_adaskip.lab.fixed_plans import Entry, at_random, evenly, latest

#: Candidates that are measured again at each step.
TRIED = 3
#: Random plans of each size.
DRAWS = 3
#: Seconds of a saving that was measured as nothing, or less.
LEAST = 1e-7
Loss = Callable[[tuple[Entry, ...]], float]


def lazy_greedy(loss: Loss, seconds: Mapping[Entry, float]) -> Iterator[Step[Entry]]:
    """Leave out, step by step, what costs least loss for each second that it saves.

    Args:
        loss: of the model without these.
        seconds: what each candidate saves of a step.

    """
    whole = loss(())
    saved = {one: max(each, LEAST) for one, each in seconds.items()}
    prices = {one: (loss((one,)) - whole) / saved[one] for one in seconds}
    left_out: tuple[Entry, ...] = ()
    before = whole
    while prices:
        cheapest = sorted(prices, key=prices.__getitem__)[:TRIED]
        losses = {one: loss((*left_out, one)) for one in cheapest}
        prices |= {one: (each - before) / saved[one] for one, each in losses.items()}
        best = min(cheapest, key=prices.__getitem__)
        left_out, before = (*left_out, best), losses[best]
        del prices[best]
        yield Step(left_out, before)


def sizes(most: int, count: int = 6) -> list[int]:
    """Return up to so many sizes of a plan, in even steps from 1 to the most."""
    count = min(count, most)
    return sorted({1 + round(index * (most - 1) / max(count - 1, 1)) for index in range(count)})


def baselines(candidates: Sequence[Entry], size: int) -> dict[str, list[Entry]]:
    """Return plans of a size that look at nothing: random ones, even, and late."""
    drawn = {f"random {draw}": at_random(candidates, size, draw) for draw in range(DRAWS)}
    return {**drawn, "even": evenly(candidates, size), "late": latest(candidates, size)}
