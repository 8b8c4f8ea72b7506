# SPDX-License-Identifier: Apache-2.0
"""Whether a model's answers are right under plans, without generating them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_adaskip.classifiers.plan import SkipPlan
from vllm_adaskip.lab.fitting.samples import (
    IGNORED,
    Batch,
    Sample,
    answer_logits,
    answer_loss,
    batches_of,
    before_answers,
)
from vllm_adaskip.lab.fitting.sub_layers import leaving_out, visited

Bools = NDArray[np.bool_]
KeysValues = tuple[Tensor, Tensor]
#: Bytes of keys and values of prompts that are kept for the next plan.
KEPT = 1 << 30


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
    """Return ``[samples]``, each under its plan.

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


class PlanLoss:
    """The mean cross-entropy of the tokens of answers that all follow a plan.

    Prompts run whole under every plan. So what stands before the answers runs once, and its keys
    and values are kept, up to `KEPT` bytes; that is most of the work where prompts are long.
    """

    @torch.no_grad()
    def __init__(self, model: Any, samples: Sequence[Sample], batch: int) -> None:
        self._model = model
        self._batches: list[tuple[Batch, list[KeysValues]]] = []
        left = KEPT
        for _, one in batches_of(samples, batch, model.device):
            kept = _prompts(model, one) if left > 0 else []
            left -= sum(each.nbytes for pair in kept for each in pair)
            self._batches.append((one, kept))

    @torch.no_grad()
    def __call__(self, plan: SkipPlan) -> float:
        """Return a plan's loss."""
        losses, tokens = [], []
        for one, kept in self._batches:
            cache = _cache(self._model, kept) if kept else None
            with visited(self._model, leaving_out(one, [plan] * len(one.ids))):
                losses.append(answer_loss(one, answer_logits(self._model, one, cache)).item())
            tokens.append(int(one.answer.sum()))
        return float(np.average(losses, weights=tokens))


def _prompts(model: Any, batch: Batch) -> list[KeysValues]:
    """Return each layer's keys and values before the answers; empty if they cannot be kept."""
    if not (count := before_answers(batch)):
        return []
    wanted = inspect.signature(model.forward).parameters
    inputs = {
        "input_ids": batch.ids[:, :count],
        "attention_mask": batch.real[:, :count].long(),
        "position_ids": batch.positions[:, :count],
        "use_cache": True,
        "logits_to_keep": 1,
    }
    output = model(**{name: each for name, each in inputs.items() if name in wanted})
    kept = [(one.keys, one.values) for one in output.past_key_values.layers]
    # A sliding window has let go of the first ones.
    return kept if all(keys.shape[2] == count for keys, _ in kept) else []


def _cache(model: Any, kept: Sequence[KeysValues]) -> Any:
    """Return a cache of transformers that holds these, and leaves them as they are."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    for layer, (keys, values) in enumerate(kept):
        cache.update(keys, values, layer)
    return cache


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
