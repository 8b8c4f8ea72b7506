# SPDX-License-Identifier: Apache-2.0
"""Chooses after which layers to look: each look costs, and pays only where a case stops.

Counted in weights that a forward reads, which is what a small batch is bound by: a look reads the
head's rows, a layer its attention's and its MLP's projections. Where a whole prompt stops (scope
``answer``) a large batch computes less than that for a look, as it is for one token of many.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_adaskip.classifiers.adainfer.fit.base import ExitFit, Ints
from vllm_adaskip.classifiers.adainfer.fit.cases import Bools, Cases
from vllm_adaskip.classifiers.plan import DecoderShape
from vllm_adaskip.lab.fitting.greedy import greedy

#: A task with fewer cases than this does not tell one wrong answer in a hundred.
ENOUGH = 100


@dataclass(frozen=True)
class Look:
    """What it saves and costs to stop where the classifiers say.

    Attributes:
        level: agreement for which cuts were chosen, layer by layer.
        layers: after which was looked.
        pruned: share of layers left out, over forwards.
        net: the same less what the looks cost.
        stopped: share of cases that stop somewhere.
        agreement: share of those whose answer stays the same; 1 where no case stops.
        worst_task: share of all cases whose answer stays the same, in the task where it is least,
            of those with `ENOUGH` cases; 1 where none has.

    """

    level: float
    layers: tuple[int, ...]
    pruned: float
    net: float
    stopped: float
    agreement: float
    worst_task: float


def check_cost(shape: DecoderShape, tokens: int, hidden_size: int) -> float:
    """Return what a look at so many tokens' logits costs, in decoder layers."""
    return tokens * hidden_size / shape.layer_parameters


def first_exits(exits: Bools, layers: Sequence[int], num_layers: int) -> Ints:
    """Return ``[cases]`` the last layer that runs, from ``[cases, layers]``."""
    after = np.append(np.array(layers, dtype=np.int64), num_layers - 1)
    always = np.ones((len(exits), 1), dtype=np.bool_)
    last: Ints = after[np.concatenate([exits, always], axis=1).argmax(1)]
    return last


def looked(cases: Cases, last: Ints, layers: Sequence[int], level: float, cost: float) -> Look:
    """Sum up which cases stop where, looking after these layers."""
    num_layers = cases.agrees.shape[1]
    checks = (last[:, None] >= np.array(layers, dtype=np.int64)).sum()
    forwards = num_layers * cases.passes.sum()
    pruned = float((num_layers - 1 - last) @ cases.passes / forwards)
    stopped = last < num_layers - 1
    same = cases.agrees[np.arange(len(cases)), last]
    by_task = [
        own for task in np.unique(cases.tasks) if (own := cases.tasks == task).sum() >= ENOUGH
    ]
    return Look(
        level,
        tuple(layers),
        pruned,
        pruned - float(checks * cost / forwards),
        float(stopped.mean()),
        float(same[stopped].mean()) if stopped.any() else 1.0,
        min((float(same[own].mean()) for own in by_task), default=1.0),
    )


def choose(cases: Cases, fit: ExitFit, level: float, most: int, cost: float) -> Look:
    """Add the layer that saves most, less what looking costs, until none does; ``most`` at most."""
    exits, places = fit.exits(level), {layer: at for at, layer in enumerate(fit.layers)}

    def look(layers: Sequence[int]) -> Look:
        chosen = sorted(layers)
        own = exits[:, [places[layer] for layer in chosen]]
        return looked(cases, first_exits(own, chosen, cases.agrees.shape[1]), chosen, level, cost)

    best = look(())
    steps: Iterator[Sequence[int]] = (
        step.left_out
        for step in greedy(lambda layers: -look(layers).net, fit.layers, most or len(fit.layers))
    )
    for layers in steps:
        if (more := look(layers)).net <= best.net:
            break
        best = more
    return best
