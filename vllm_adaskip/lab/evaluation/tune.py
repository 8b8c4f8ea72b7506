# SPDX-License-Identifier: Apache-2.0
"""Picks the setting that saves most within a loss the user names, and proves it held out.

One half of the items orders the settings from the safest to the boldest. The other half tests
them in that order, each against a one-sided 95 % bound on its mean loss, until one fails
(fixed-sequence testing, as in "Learn then Test", arXiv 2110.01052): whichever of those that
passed is taken, the chance that its true loss is larger than allowed is at most 5 %.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_adaskip.lab.data.items import Item
from vllm_adaskip.lab.data.metrics import PERPLEXITY
from vllm_adaskip.lab.evaluation.quality import unseen, upper_bound
from vllm_adaskip.lab.evaluation.results import Answer

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Trial:
    """One setting: its loss on the half that orders, and what the other half says.

    Attributes:
        setting: its name.
        expected: mean loss (dense score minus its score) on the first half.
        loss: mean loss on the held-out half; None where it was not tested.
        bound: one-sided 95 % upper bound of the held-out loss.
        kept: share of compute kept on the first half.

    """

    setting: str
    expected: float
    kept: float
    loss: float | None = None
    bound: float | None = None


def halves(items: Sequence[Item], seed: int) -> tuple[list[Item], list[Item]]:
    """Split each task's items in two, at random by ``seed``."""
    rng = random.Random(seed)
    first: set[str] = set()
    for task in sorted({item.task for item in items}):
        names = [item.item for item in items if item.task == task]
        rng.shuffle(names)
        first.update(names[: len(names) // 2])
    return (
        [item for item in items if item.item in first],
        [item for item in items if item.item not in first],
    )


def check(first: Sequence[Item], second: Sequence[Item], max_loss: float) -> None:
    """Refuse, before anything is run, items by which no setting can be chosen.

    Raises:
        ValueError: a half without scores, or too few items for any bound to be within the loss.

    """
    order, test = (sum(one.metric != PERPLEXITY for one in half) for half in (first, second))
    if not order + test:
        raise ValueError("no item has a score, only perplexities; allowed: metrics with points")
    if not order or not test:
        raise ValueError(
            f"{order + test} items, no task with two: one half of each task orders the settings, "
            "the other tests them; allowed: at least two items of a task"
        )
    if (least := unseen(test, CONFIDENCE)) > max_loss:
        needed = math.ceil(math.log(1 - CONFIDENCE) / math.log(1 - max_loss)) if max_loss else None
        more = f"at least {needed} held-out items (a larger --limit), or " if needed else ""
        raise ValueError(
            f"{test} held-out items cannot show a loss of at most {max_loss:g}, even if none is "
            f"lost; allowed: {more}--max-loss {math.ceil(1000 * least) / 1000:g} or more"
        )


def losses(answers: Sequence[Answer], setting: str, items: Sequence[Item]) -> list[float]:
    """Return dense score minus a setting's score, of each of the items with a score."""
    score = {(one.setting, one.item): one.score for one in answers}
    return [
        score["dense", item.item] - score[setting, item.item]
        for item in items
        if item.metric != PERPLEXITY
    ]


def trials(
    answers: Sequence[Answer],
    settings: Sequence[str],
    first: Sequence[Item],
    second: Sequence[Item],
    max_loss: float,
) -> list[Trial]:
    """Test settings from the safest to the boldest until one fails; untested ones follow."""
    kept = _kept(answers, {item.item for item in first})
    expected = {name: float(np.mean(losses(answers, name, first))) for name in settings}
    order = sorted(settings, key=lambda name: (expected[name], -kept[name]))
    done: list[Trial] = []
    failed = False
    for name in order:
        trial = Trial(name, expected[name], kept[name])
        if not failed:
            held_out = losses(answers, name, second)
            bound = upper_bound(held_out, CONFIDENCE)
            trial = Trial(name, expected[name], kept[name], float(np.mean(held_out)), bound)
            failed = bound > max_loss
        done.append(trial)
    return done


def choose(done: Sequence[Trial], max_loss: float, speed: Mapping[str, float]) -> Trial | None:
    """Return the fastest that passed, if it is faster than dense; None: there is none.

    Times decide nothing about losses, so that any of those that passed may be taken.

    Args:
        done: from `trials`.
        max_loss: the largest loss allowed.
        speed: setting -> time against dense, smaller is faster; of settings whose numbers are in
            doubt there is none.

    """
    passed = [one for one in done if one.bound is not None and one.bound <= max_loss]
    faster = [one for one in passed if speed.get(one.setting, 1) < 1]
    return min(faster, key=lambda one: speed[one.setting], default=None)


def _kept(answers: Sequence[Answer], items: set[str]) -> dict[str, float]:
    """Mean share of compute kept, by setting."""
    found: dict[str, list[float]] = {}
    for one in answers:
        if one.item in items:
            found.setdefault(one.setting, []).append(one.kept)
    return {name: float(np.mean(values)) for name, values in found.items()}
