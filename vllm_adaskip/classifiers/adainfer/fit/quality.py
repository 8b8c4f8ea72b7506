# SPDX-License-Identifier: Apache-2.0
"""What exits do to answers: layer by layer, task by task, and case by case as a server decides."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_adaskip.classifiers.adainfer.fit.base import ExitFit, Ints
from vllm_adaskip.classifiers.adainfer.fit.cases import Cases, Floats
from vllm_adaskip.classifiers.adainfer.fit.check_layers import Look, first_exits
from vllm_adaskip.classifiers.adainfer.rules import ExitRule


@dataclass(frozen=True)
class LayerJudged:
    """A layer by cross-validation, as if all cases came to it.

    Attributes:
        settled: share of cases whose likeliest token is the final one.
        coverage: share that the classifier would stop; ``agreement``: of these, settled ones.
        is_checked: whether a server looks there.

    """

    layer: int
    settled: float
    coverage: float
    agreement: float
    is_checked: bool


@dataclass(frozen=True)
class TaskExits:
    """Held-back cases of one task, decided as a server would.

    Attributes:
        depth: layers that run, on average over forwards; ``pruned``: share of layers left out.
        same: share of all cases whose answer stays the same.
        dense: share of right answers at full depth; ``right``: with exits.

    """

    task: str
    cases: int
    depth: float
    pruned: float
    same: float
    dense: float
    right: float


def stops(rule: ExitRule, cases: Cases) -> Ints:
    """Return ``[cases]`` the last layer that runs, as a server decides it."""
    seen: Floats = np.zeros((len(cases), 2))
    exits = np.empty((len(cases), len(rule.layers)), dtype=np.bool_)
    for place, layer in enumerate(rule.layers):
        exits[:, place], seen = rule.settled(layer, cases.features[:, layer], seen)
    return first_exits(exits, rule.layers, cases.agrees.shape[1])


def task_exits(name: str, cases: Cases, last: Ints) -> TaskExits:
    """Sum up cases that stopped after these layers."""
    row, num_layers = np.arange(len(cases)), cases.agrees.shape[1]
    depth = float(np.average(last + 1, weights=cases.passes))
    return TaskExits(
        str(name),
        len(cases),
        depth,
        1 - depth / num_layers,
        float(cases.agrees[row, last].mean()),
        float(cases.right[:, -1].mean()),
        float(cases.right[row, last].mean()),
    )


def layers_judged(cases: Cases, whole: ExitFit, fit: ExitFit, chosen: Look) -> list[LayerJudged]:
    """Judge layers; a chain's check layers by themselves, as no server follows the whole one."""
    exits = dict(zip(whole.layers, whole.exits(chosen.level).T, strict=True))
    exits |= dict(zip(fit.layers, fit.exits(chosen.level).T, strict=True))
    found = []
    for layer, own in sorted(exits.items()):
        agrees = cases.agrees[:, layer]
        agreement = float(agrees[own].mean()) if own.any() else 1.0
        is_checked = layer in chosen.layers
        found.append(
            LayerJudged(layer, float(agrees.mean()), float(own.mean()), agreement, is_checked)
        )
    return found
