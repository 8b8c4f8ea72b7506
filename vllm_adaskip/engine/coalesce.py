# SPDX-License-Identifier: Apache-2.0
"""Draws sequences together: of the plans that each allows, those that add least to the batch.

Pure: made from arrays, without vLLM. A plan changes which sub-layers its sequence leaves out, not
how much: sharing is no other way of skipping more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_adaskip.classifiers import Classifier, DecoderShape, PromptStatistics, SkipPlan

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]

#: What one more row costs at a sub-layer that others run, as a share of running it for the first:
#: a layer of the bundled model takes 279 us for one row, 596 us for 64 (docs/kv-cache.md).
ROW = 1 / 64
#: What it costs to part rows that went together through a sub-layer: to gather and to scatter.
PART = 1 / 16


@dataclass(frozen=True)
class Undrawn:
    """A sequence that has a plan of its own and may get another.

    Attributes:
        own: what the method decided from its prompt.
        budget: largest share of decoder compute its plan may keep.
        prompt: what was observed of it.

    """

    own: SkipPlan
    budget: float
    prompt: PromptStatistics


def coalesced(
    sequences: Sequence[Undrawn],
    live: BoolArray,
    classifier: Classifier,
    shape: DecoderShape,
    limit: float,
) -> list[SkipPlan]:
    """Return the plans of sequences whose prompts became complete in the same step.

    Every argument is the same on all ranks, and so is what is done with them, so the plans are.

    Args:
        sequences: in any order.
        live: ``[rows, 2 * num_layers]``, what the sequences leave out that have a plan already.
        classifier: its codebook's plans are candidates, and its regrets decide.
        shape: the model's.
        limit: largest regret that is allowed, the option `coalesce_regret`.

    """
    plans = _candidates([*(one.own for one in sequences), *classifier.codebook], live)
    left_out = np.array([plan.mask() for plan in plans])
    shares = np.array([plan.share(shape) for plan in plans])
    regrets = np.array([classifier.regrets(one.own, left_out, one.prompt) for one in sequences])
    allowed = regrets <= limit
    for row, one in enumerate(sequences):
        allowed[row] &= within_reach(shares, one.own.share(shape), one.budget, shape)
        allowed[row, plans.index(one.own)] = True
    weights = np.tile([shape.attention_parameters, shape.mlp_parameters], shape.num_layers)
    return [plans[index] for index in drawn(allowed, regrets, left_out, live, weights)]


def within_reach(shares: FloatArray, own: float, budget: float, shape: DecoderShape) -> BoolArray:
    """Return which plans meet a budget and keep about as much as the own plan.

    At most a layer more: otherwise sequences would follow a dense request of the batch, and
    others would follow them. Less only by a sub-layer, which is how closely methods meet a budget.

    Args:
        shares: ``[plans]``, of decoder compute that they keep.
        own: the own plan's.
        budget: the largest that is allowed.
        shape: the model's.

    """
    sub_layer = max(shape.attention_parameters, shape.mlp_parameters) / shape.layer_parameters
    near: BoolArray = shares >= own - sub_layer / shape.num_layers - 1e-9
    return near & (shares <= min(budget, own + 1 / shape.num_layers + 1e-9))


def drawn(
    allowed: BoolArray,
    regrets: FloatArray,
    left_out: BoolArray,
    live: BoolArray,
    weights: NDArray[np.int64],
) -> list[int]:
    """Return one of the plans that each sequence allows, so that the batch runs little more.

    The plan that adds least work for each sequence that allows it goes first, to all of these; then
    the next, for those that are left: the greedy rule for weighted set cover. Of equals the plan
    with the smaller regret, then the first.

    Args:
        allowed: ``[sequences, plans]``, at least one for each sequence.
        regrets: ``[sequences, plans]``, looked at where allowed.
        left_out: ``[plans, sub_layers]``.
        live: ``[rows, sub_layers]``, what the others in the batch leave out.
        weights: ``[sub_layers]``, parameters of each.

    """
    runs = ~left_out
    by_some = ~live.all(axis=0)
    by_all = by_some & ~live.any(axis=0)  # an empty batch: neither by some nor by all
    own_share = ROW * (runs @ weights)
    found = np.zeros(len(allowed), dtype=np.int64)
    waiting = allowed.copy()
    while waiting.any():
        votes = waiting.sum(axis=0)
        added = (runs & ~by_some) @ weights + PART * ((left_out & by_all) @ weights)
        each = np.where(votes > 0, own_share + added / np.maximum(votes, 1), np.inf)
        worst = np.where(waiting, regrets, 0.0).max(axis=0)
        best = int(np.lexsort((worst, each))[0])
        found[waiting[:, best]] = best
        waiting[waiting[:, best]] = False
        by_all = runs[best] & (by_all | ~by_some.any())
        by_some = by_some | runs[best]
    chosen: list[int] = found.tolist()
    return chosen


def _candidates(plans: Iterable[SkipPlan], live: BoolArray) -> list[SkipPlan]:
    """Return every plan once, with those that are followed, in an order that is always the same."""
    followed = (SkipPlan.of_mask(mask) for mask in np.unique(live, axis=0))
    return sorted({*plans, *followed}, key=lambda plan: (plan.attention, plan.mlp))
