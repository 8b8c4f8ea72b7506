# SPDX-License-Identifier: Apache-2.0
"""Chooses the few plans that decisions snap to, by what snapping costs the training prompts.

A decision snaps to a plan that skips no layer beyond it (`nearest_within`), so a good codebook
holds subsets of many prompts' plans. And a budget is met by allowing more layers until some plan
fits, so it also needs plans for budgets. Both costs are counted in layers, and plans are picked
one by one, then exchanged while that helps, as in k-medoids. Against k-means on the plans' bits,
each cluster standing for the layers that at least 95 % of its members skip, this kept more: with
eight plans for the bundled model 23.5, 21.1 and 20.5 % of layers left out against 20.3, 15.8 and
19.7 (three sets of routers, about 25.5 % without a codebook).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vllm_adaskip.classifiers.first.method import First, FirstOptions
from vllm_adaskip.classifiers.plan import DecoderShape

#: Budgets that a codebook is made for, at the fit's own threshold.
BUDGETS = (0.9, 0.75, 0.6)
#: Most of the plans that prompts have; only these are tried, with what two of them share.
_COMMON = 64

Scores = NDArray[np.float64]
Weights = NDArray[np.float64]
#: ``[plans, layers]``, True: left out.
Plans = NDArray[np.bool_]


def plans_of(scores: Scores, options: FirstOptions, budget: float = 1.0) -> Plans:
    """Return each prompt's plan, as a server decides it."""
    shape = DecoderShape(scores.shape[1], 1, 1)
    method = First(shape, options, Path())  # whose routers are not needed, as the scores are here
    return np.array([method.plan(row, budget).mask()[::2] for row in scores])


def fit_codebook(
    scores: Scores,
    weights: Weights,
    options: FirstOptions,
    size: int,
    thresholds: Sequence[float] = (),
) -> list[list[int | str]]:
    """Choose at most ``size`` plans for prompts with these scores.

    Args:
        scores: ``[prompts, layers]``, reduced.
        weights: ``[prompts]``, how much each counts.
        options: of the method, without a codebook; its threshold counts threefold.
        size: how many plans; 0: none.
        thresholds: others that may be asked for.

    """
    num_layers = scores.shape[1]
    least = (num_layers - len(options.inner(num_layers))) / num_layers
    cases = [(options.threshold, 1.0, 3.0), *((other, 1.0, 1.0) for other in thresholds)]
    cases += [(options.threshold, budget, 1.0) for budget in BUDGETS if budget >= least]
    free = [
        (plans_of(scores, options.model_copy(update={"threshold": threshold}), budget), budget)
        for threshold, budget, _ in cases
    ]
    tried = _candidates(np.concatenate([plans for plans, _ in free]))
    rank = _ranks(scores, options.inner(num_layers))
    costs = np.concatenate([_costs(rank, plans, budget, tried) for plans, budget in free])
    counts = np.concatenate([weights * count for *_, count in cases])
    chosen = _choose(costs * counts[:, None], min(size, len(tried) - 1))
    plans = {tuple(np.flatnonzero(tried[one]).tolist()) for one in chosen} - {()}
    return [[*plan] for plan in sorted(plans, key=lambda plan: (len(plan), plan))]


def _candidates(plans: Plans) -> Plans:
    """Return the dense plan, then all that are tried."""
    found, count = np.unique(plans, axis=0, return_counts=True)
    common = found[np.argsort(-count, kind="stable")[:_COMMON]]
    shared = (common[:, None] & common[None]).reshape(-1, plans.shape[1])
    tried = np.unique(np.concatenate([common, shared]), axis=0)
    dense = np.zeros((1, plans.shape[1]), dtype=np.bool_)
    return np.concatenate([dense, tried[tried.any(1)]])


def _ranks(scores: Scores, inner: range) -> NDArray[np.int64]:
    """Return each layer's place in the order in which layers are left out, from 1; 0: never."""
    order = np.argsort(scores[:, inner.start : inner.stop], axis=1, kind="stable") + inner.start
    rank = np.zeros(scores.shape, dtype=np.int64)
    np.put_along_axis(rank, order, np.arange(1, len(inner) + 1)[None], axis=1)
    return rank


def _costs(
    rank: NDArray[np.int64], free: Plans, budget: float, tried: Plans
) -> NDArray[np.float64]:
    """Return ``[prompts, plans]``: layers by which snapping to a plan differs from not snapping.

    That is layers that would have to be allowed in addition, and layers skipped less.
    """
    num_layers = rank.shape[1]
    last = np.stack([(rank * plan).max(1) for plan in tried], axis=1)
    without, size = free.sum(1)[:, None], tried.sum(1)[None]
    beyond = (last - without).clip(min=0)
    unfit = size < (1 - budget) * num_layers - 1e-9
    if budget == 1:
        unfit = unfit | (beyond > 0)  # one that fits is always there: the dense plan
    return np.where(unfit, without, beyond + (without - size).clip(min=0)).astype(np.float64)


def _choose(costs: NDArray[np.float64], size: int) -> Sequence[int]:
    """Return ``size`` columns that together have the least sum of row minima, beside the first."""
    chosen: list[int] = []
    for _ in range(size):
        chosen.append(_best(costs, chosen))
    for place in range(len(chosen) * 4):  # in turn; a few rounds leave nothing to exchange
        place %= len(chosen)
        others = chosen[:place] + chosen[place + 1 :]
        chosen[place] = _best(costs, others)
    return chosen


def _best(costs: NDArray[np.float64], others: Sequence[int]) -> int:
    """Return the column that helps most beside the first and these."""
    so_far = costs[:, [0, *others]].min(1)
    return int(np.minimum(so_far[:, None], costs).sum(0).argmin())
