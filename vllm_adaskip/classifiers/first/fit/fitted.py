# SPDX-License-Identifier: Apache-2.0
"""Fits FiRST (arXiv 2410.12513): routers, then LoRA if asked for, then what turns scores to plans.

The paper leaves open how scores become decisions. Here a threshold is set by the share of layers
to leave out, and a codebook by the plans of training prompts, both on the model as it is served.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vllm_adaskip.classifiers.first.fit.codebook import Scores, Weights, fit_codebook, plans_of
from vllm_adaskip.classifiers.first.fit.lora import train_lora
from vllm_adaskip.classifiers.first.fit.routers import train_routers
from vllm_adaskip.classifiers.first.fit.routing import Routing, prompt_scores
from vllm_adaskip.classifiers.first.fit.settings import FirstSettings
from vllm_adaskip.classifiers.first.fit.thresholds import at_target, share_skipped, with_thresholds
from vllm_adaskip.classifiers.first.method import FirstOptions
from vllm_adaskip.classifiers.plan import SkipPlan
from vllm_adaskip.lab.fitting.quality import TaskQuality, answers_right, by_task
from vllm_adaskip.lab.fitting.samples import Sample
from vllm_adaskip.lab.fitting.training import Curve, adapt, save_adapter

#: In the profile's folder until the fit is done, one for each phase.
CHECKPOINTS = ("routers.checkpoint", "lora.checkpoint")
#: Prompts are as many as this at most where a few say as much as all.
_PROMPTS = 1000
#: Average shares that a codebook is made for beside the fit's own target.
_TARGETS = (0.15, 0.4)


@dataclass(frozen=True)
class Fitted:
    """What came of a fit; its weights lie in its folder.

    Attributes:
        options: of the method, complete.
        metrics: figures for the profile.
        curves: the terms of the loss at each step, by phase.
        tasks: quality on held-back examples.

    """

    options: FirstOptions
    metrics: dict[str, float | int | str]
    curves: dict[str, Curve]
    tasks: list[TaskQuality]


def fit_first(
    model: Any,
    samples: Sequence[Sample],
    settings: FirstSettings,
    folder: Path,
    report: Callable[[str, int], None],
) -> Fitted:
    """Fit a model of transformers, frozen but for LoRA; write routers and LoRA into the folder.

    A fifth of the samples is held back, for thresholds and figures. ``report`` is told what is
    being done, and how many more steps of training are.
    """
    model.requires_grad_(False)
    held_back, training = held_back_of(samples)
    prompts = training[:_PROMPTS]
    weights, target, batch = answer_tokens(held_back), settings.target_skip, settings.batch
    routers, curve = train_routers(
        model, training, settings, folder / CHECKPOINTS[0],
        lambda steps: report("training routers", steps),
    )  # fmt: skip
    curves = {"routers": curve}
    report("asking held-back questions", 0)
    num_layers = len(routers.weight)
    dense = answers_right(model, held_back, [SkipPlan(num_layers)] * len(held_back), batch)

    def scores(some: Sequence[Sample]) -> Scores:
        report("scoring prompts", 0)
        return prompt_scores(model, routers, settings.method, some, batch)

    if settings.lora_steps:
        options = with_thresholds(settings.method, scores(held_back), weights, target)

        def keep(score: Tensor) -> Tensor:
            return (score >= options.threshold).float()

        adapted = adapt(model, settings.lora_rank, settings.seed)
        curves["LoRA"] = train_lora(
            model, training, lambda one: Routing(routers, options, one, keep),
            steps=settings.lora_steps, batch=batch, rate=settings.lora_lr, seed=settings.seed,
            checkpoint=folder / CHECKPOINTS[1], made=lambda steps: report("training LoRA", steps),
        )  # fmt: skip
        save_adapter(adapted, folder)
    options = with_codebook(settings, scores(prompts), answer_tokens(prompts))
    own = scores(held_back)
    options = with_thresholds(options, own, weights, target)
    plans = plans_of(own, options)
    unsnapped = plans_of(own, options.model_copy(update={"codebook": []}))
    report("asking held-back questions", 0)
    followed = [SkipPlan.parse(np.flatnonzero(row).tolist(), num_layers) for row in plans]
    routed = answers_right(model, held_back, followed, batch)
    routers.save(folder)
    tasks = by_task(held_back, plans, dense, routed)
    metrics: dict[str, float | int | str] = {
        "examples": len(samples),
        "held_back": len(held_back),
        "steps": settings.steps,
        "lora_steps": settings.lora_steps,
        "skipped": share_skipped(plans, weights),
        "skipped_without_codebook": share_skipped(unsnapped, weights),
        "right_dense": float(dense.mean()),
        "right_routed": float(routed.mean()),
        "largest_drop_of_a_task": max(one.dense - one.routed for one in tasks),
    }
    return Fitted(options, metrics, curves, tasks)


def held_back_of(samples: Sequence[Sample]) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """Split examples into those that judge, and those that train."""
    size = len(samples) // 5
    return samples[: min(size, _PROMPTS)], samples[size:]


def with_codebook(settings: FirstSettings, scores: Scores, weights: Weights) -> FirstOptions:
    """Add a codebook to the method's options: for the target, and for others users may set."""
    if not settings.codebook:
        return settings.method
    options = with_thresholds(settings.method, scores, weights, settings.target_skip)
    thresholds = [at_target(options, target).threshold for target in _TARGETS]
    codebook = fit_codebook(scores, weights, options, settings.codebook, thresholds)
    return settings.method.model_copy(update={"codebook": codebook})


def answer_tokens(samples: Sequence[Sample]) -> Weights:
    """Count the tokens of each answer: a plan saves as much on each."""
    return np.array([one.answer for one in samples], dtype=np.float64)
