# SPDX-License-Identifier: Apache-2.0
"""Fits AdaInfer (arXiv 2403.02181): a classifier, where it looks, and when it is sure enough.

The paper looks after every layer and takes a classifier's word. Here the layers to look after
are chosen by what they save and cost, and cuts so that cases that stop, where they first would,
agree with the whole model as often as asked. All that is chosen goes by cases that the classifiers
were not fitted on; the figures come from examples that nothing was chosen by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_adaskip.classifiers.adainfer.fit.base import LEAST, ExitFit, Ints, folds_of
from vllm_adaskip.classifiers.adainfer.fit.cases import Cases
from vllm_adaskip.classifiers.adainfer.fit.check_layers import Look, choose, first_exits, looked
from vllm_adaskip.classifiers.adainfer.fit.crf import CrfFit
from vllm_adaskip.classifiers.adainfer.fit.quality import (
    LayerJudged,
    TaskExits,
    layers_judged,
    stops,
    task_exits,
)
from vllm_adaskip.classifiers.adainfer.fit.settings import AdaInferSettings
from vllm_adaskip.classifiers.adainfer.fit.svm import SvmFit
from vllm_adaskip.classifiers.adainfer.fit.threshold import ThresholdFit
from vllm_adaskip.classifiers.adainfer.rules import ExitRule

#: Agreements for which cuts are tried, beside those between the one asked for and 1.
_LEVELS = (0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999, 1.0)


@dataclass(frozen=True)
class Fitted:
    """What came of a fit.

    Attributes:
        rule: what a server decides by.
        fit: what it came of, to be saved beside it.
        looks: by cross-validation, for each level that was tried; ``chosen`` is one of them.
        layers: see `LayerJudged`.
        tasks: of held-back examples, and of all of them.
        metrics: figures for the profile.

    """

    rule: ExitRule
    fit: ExitFit
    looks: Sequence[Look]
    chosen: Look
    layers: Sequence[LayerJudged]
    tasks: Sequence[TaskExits]
    metrics: dict[str, float | int | str]


def fit_adainfer(cases: Cases, settings: AdaInferSettings, cost: float) -> Fitted:
    """Fit cases of examples in random order, of which a fifth is held back.

    Args:
        cases: of the examples.
        settings: what the user said.
        cost: of a look, in decoder layers.

    Raises:
        ValueError: no case may stop anywhere, or not at a layer that was asked for.

    """
    held_back = cases.samples <= np.quantile(cases.samples, 0.2)
    judges, training = cases.of(held_back), cases.of(~held_back)
    folds = folds_of(training, settings.seed)
    fit = whole = _fit(training, folds, settings)
    while True:
        looks = _looks(training, fit, settings, cost)
        chosen = _best(looks, settings.agreement)
        if chosen.layers == fit.layers:
            break
        if not chosen.layers:
            raise ValueError(
                f"no check layer pays: at an agreement of {settings.agreement:g} the examples save "
                f"less than the looks cost ({cost:.2f} layers each); allowed: a lower --agreement, "
                "--candidates, or --check-layers"
            )
        fit = fit.only(chosen.layers)  # a chain of other layers has other cuts
    rule = fit.rule(chosen.level)
    last = stops(rule, judges)
    own = looked(judges, last, rule.layers, chosen.level, cost)
    tasks = [task_exits(name, judges.of(judges.tasks == name), last[judges.tasks == name])
             for name in np.unique(judges.tasks)]  # fmt: skip
    together = task_exits("all", judges, last)
    metrics: dict[str, float | int | str] = {
        "examples": len(np.unique(cases.samples)),
        "held_back": len(np.unique(judges.samples)),
        "check_cost_in_layers": cost,
        "level": chosen.level,
        "pruned": own.pruned,
        "pruned_less_checks": own.net,
        "stopped": own.stopped,
        "agreement_of_stopped": own.agreement,
        "right_dense": together.dense,
        "right_with_exits": together.right,
        "largest_drop_of_a_task": max(one.dense - one.right for one in tasks),
    }
    judged = layers_judged(training, whole, fit, chosen)
    return Fitted(rule, fit, looks, chosen, judged, [*tasks, together], metrics)


def _fit(cases: Cases, folds: Ints, settings: AdaInferSettings) -> ExitFit:
    """Fit at all layers that may be looked after: where some case is settled."""
    layers = settings.check_layers
    if layers is None:
        settled = cases.agrees[:, :-1].sum(0)
        layers = np.flatnonzero(settled >= LEAST).tolist()
        if not layers:
            raise ValueError(
                f"this model cannot stop early here: of {len(cases)} answers at most "
                f"{settled.max()} are what they will be after any layer but the last, and "
                f"{LEAST} are needed to learn from; allowed: other or more examples"
            )
    if settings.classifier == "svm":
        return SvmFit(cases, folds, layers, settings.kernel, settings.seed)
    return (CrfFit if settings.classifier == "crf" else ThresholdFit)(cases, folds, layers)


def _looks(cases: Cases, fit: ExitFit, settings: AdaInferSettings, cost: float) -> list[Look]:
    between = np.linspace(settings.agreement, 1, 6).tolist()
    levels = sorted({round(level, 6) for level in (*_LEVELS, *between)})
    if settings.check_layers is None:
        return [choose(cases, fit, level, settings.checks, cost) for level in levels]
    num_layers = cases.agrees.shape[1]
    lasts = [first_exits(fit.exits(level), fit.layers, num_layers) for level in levels]
    return [
        looked(cases, last, fit.layers, level, cost)
        for last, level in zip(lasts, levels, strict=True)
    ]


def _best(looks: Sequence[Look], agreement: float) -> Look:
    """Return the one that saves most among those that agree enough, together and in each task.

    Where none does, as with an agreement of 1, the one that agrees most.
    """
    sure = [min(one.agreement, one.worst_task) for one in looks]
    enough = min(agreement, max(sure))
    return max((one for one, own in zip(looks, sure, strict=True) if own >= enough),
               key=lambda one: one.net)  # fmt: skip
