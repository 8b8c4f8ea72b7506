# SPDX-License-Identifier: Apache-2.0
"""Whether a model's answers are right under plans, without generating them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_adaskip.classifiers.plan import SkipPlan
from vllm_adaskip.lab.fitting.samples import IGNORED, Sample, answer_logits, answer_loss, batches_of
from vllm_adaskip.lab.fitting.sub_layers import leaving_out, visited

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class TaskQuality:
    """The samples of one task: right answers dense and under their plans, and those plans.

    Attributes:
        skipped: share of layers that the plans leave out.
        plans: how many different ones there are; ``often`` is the commonest, as layers.

    """

    task: str
    samples: int
    dense: float
    routed: float
    skipped: float
    plans: int
    often: list[int]


@torch.no_grad()
def answers_right(
    model: Any, samples: Sequence[Sample], plans: Sequence[SkipPlan], batch: int
) -> Bools:
    """Give ``[samples]``, each under its plan.

    Fed with the right tokens: each is the likeliest one just where greedy decoding gives them all.
    """
    right = np.zeros(len(samples), dtype=np.bool_)
    for places, one in batches_of(samples, batch, model.device):
        with visited(model, leaving_out(one, [plans[place] for place in places])):
            logits = answer_logits(model, one)
        labels = one.labels[:, -logits.shape[1] :]
        same = (logits.argmax(-1) == labels) | (labels == IGNORED)
        right[places] = same.all(1).cpu().numpy()
    return right


@torch.no_grad()
def plan_loss(model: Any, samples: Sequence[Sample], plan: SkipPlan, batch: int) -> float:
    """Give the mean cross-entropy of the tokens of answers that all follow a plan."""
    losses, tokens = [], []
    for _, one in batches_of(samples, batch, model.device):
        with visited(model, leaving_out(one, [plan] * len(one.ids))):
            losses.append(answer_loss(one, answer_logits(model, one)).item())
        tokens.append(int(one.answer.sum()))
    return float(np.average(losses, weights=tokens))


def by_task(
    samples: Sequence[Sample], plans: Bools, dense: Bools, routed: Bools
) -> list[TaskQuality]:
    """Sum up what `answers_right` gave without and with these plans, tasks in order of name."""
    tasks = np.array([one.task for one in samples])
    found = []
    for task in np.unique(tasks):
        own = tasks == task
        kinds, count = np.unique(plans[own], axis=0, return_counts=True)
        found.append(
            TaskQuality(
                task=str(task),
                samples=int(own.sum()),
                dense=float(dense[own].mean()),
                routed=float(routed[own].mean()),
                skipped=float(plans[own].mean()),
                plans=len(kinds),
                often=np.flatnonzero(kinds[count.argmax()]).tolist(),
            )
        )
    return found
