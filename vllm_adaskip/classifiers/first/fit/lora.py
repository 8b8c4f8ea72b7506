# SPDX-License-Identifier: Apache-2.0
"""Trains LoRA weights (arXiv 2106.09685) while layers are skipped: FiRST's second phase.

The prompt runs through the adapted weights too, because a server merges them when it loads the
model; so what the routers read changes a little, and is read again afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_adaskip.classifiers.first.fit.gated import Gate, gated_loss
from vllm_adaskip.classifiers.first.fit.training import Curve, Training
from vllm_adaskip.lab.fitting.samples import Batch, Sample


def adapt(model: Any, rank: int, seed: int) -> Any:
    """Put LoRA beside every linear layer of the decoder, in place; give peft's model of it.

    The form is the plain one that a server can merge. At first it changes nothing.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    form = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    return get_peft_model(model, form)


def no_skipping(batch: Batch) -> Gate:
    """Run every layer: with this, what LoRA does by itself is measured."""
    return lambda layer, before: before.new_ones(len(before))


def train_lora(
    model: Any,
    samples: Sequence[Sample],
    gate_of: Callable[[Batch], Gate],
    *,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    checkpoint: Path,
    made: Callable[[int], None],
) -> Curve:
    """Train what `adapt` added to a model, each batch under its gates."""
    weights = {name: one for name, one in model.named_parameters() if one.requires_grad}
    training = Training(
        weights, samples, steps=steps, batch=batch, rate=rate, seed=seed, checkpoint=checkpoint
    )

    def loss(one: Batch) -> Mapping[str, Tensor]:
        return {"cross-entropy": gated_loss(model, one, gate_of(one))}

    return training.run(loss, model.device, made)
