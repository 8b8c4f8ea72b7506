# SPDX-License-Identifier: Apache-2.0
"""What a model says where an answer's tokens are to come, all at once, fed with the right ones."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from torch.nn import functional

from vllm_adaskip.lab.fitting.samples import IGNORED, Batch


def answer_logits(model: Any, batch: Batch) -> Tensor:
    """Give logits ``[rows, tokens - 1 or fewer, vocabulary]`` for the last of `Batch.labels`."""
    wanted = inspect.signature(model.forward).parameters
    first = int(batch.answer.any(0).int().argmax())
    inputs = {
        "input_ids": batch.ids,
        "attention_mask": batch.real.long(),
        "position_ids": batch.positions,
        "use_cache": False,
        # The logits of a prompt would take more memory than all else.
        "logits_to_keep": batch.ids.shape[1] - first + 1,
    }
    output = model(**{name: each for name, each in inputs.items() if name in wanted})
    logits: Tensor = output.logits[:, first - 1 - batch.ids.shape[1] : -1]
    return logits


def answer_loss(batch: Batch, logits: Tensor) -> Tensor:
    """Give the mean cross-entropy of the answers' tokens, from `answer_logits`."""
    labels = batch.labels[:, -logits.shape[1] :]
    return functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED
    )
