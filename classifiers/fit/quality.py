# SPDX-License-Identifier: Apache-2.0
"""Whether a model's answers are right under plans, without generating them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_adaskip.classifiers.fit.batch import batches_of
from vllm_adaskip.classifiers.fit.gated import Gate, answer_logits, answer_loss
from vllm_adaskip.evaluation.sweep import IGNORED, Sample

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
def answers_right(model: Any, samples: Sequence[Sample], plans: Bools, batch: int) -> Bools:
    """Give ``[samples]``, each under the layers ``[samples, layers]`` that it leaves out.

    Fed with the right tokens: each is the likeliest one just where greedy decoding gives them all.
    """
    right = np.zeros(len(samples), dtype=np.bool_)
    for places, one in batches_of(samples, batch, model.device):
        logits = answer_logits(model, one, _hard(torch.tensor(~plans[places], device=model.device)))
        labels = one.labels[:, -logits.shape[1] :]
        same = (logits.argmax(-1) == labels) | (labels == IGNORED)
        right[places] = same.all(1).cpu().numpy()
    return right


@torch.no_grad()
def plan_loss(model: Any, samples: Sequence[Sample], left_out: Sequence[int], batch: int) -> float:
    """Give the mean cross-entropy of answers that all leave out these layers."""
    losses = []
    for _, one in batches_of(samples, batch, model.device):
        kept = torch.ones(len(one.ids), model.config.num_hidden_layers, dtype=torch.bool)
        kept[:, list(left_out)] = False
        losses.append(answer_loss(model, one, _hard(kept.to(model.device))).item())
    return float(np.mean(losses))


def _hard(kept: Tensor) -> Gate:
    return lambda layer, before: kept[:, layer].to(before.dtype)


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
