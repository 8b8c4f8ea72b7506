# SPDX-License-Identifier: Apache-2.0
"""Trains LoRA weights (arXiv 2106.09685) while layers are skipped: FiRST's second phase.

The prompt runs through the adapted weights too, because a server merges them when it loads the
model; so what the routers read changes a little, and is read again afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vllm_adaskip.classifiers.first.fit.gated import Gate, gated_loss
from vllm_adaskip.lab.fitting.samples import Batch, Sample
from vllm_adaskip.lab.fitting.training import Curve, Training, in_any_order


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
        weights, in_any_order(samples, batch, seed), steps=steps, rate=rate, checkpoint=checkpoint
    )

    def loss(one: Batch) -> Mapping[str, Tensor]:
        return {"cross-entropy": gated_loss(model, one, gate_of(one))}

    return training.run(loss, model.device, made)
