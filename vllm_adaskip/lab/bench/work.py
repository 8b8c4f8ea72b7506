# SPDX-License-Identifier: Apache-2.0
"""What a decode step must read and compute at least, counted from its plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_adaskip.classifiers import DecoderShape, SkipPlan
from vllm_adaskip.lab.bench.shapes import Shape
from vllm_adaskip.model_executors.registry import FAMILIES

#: Of bfloat16.
_SIZE = 2


@dataclass(frozen=True)
class Work:
    """The least work of a step.

    Attributes:
        weight_bytes: of sub-layers that any row needs, and of the LM head.
        kv_bytes: of every row's context, in each layer whose attention it runs.
        operations: a multiply and an add are two.

    """

    weight_bytes: int
    kv_bytes: int
    operations: int

    @classmethod
    def of(cls, shape: Shape, plans: Sequence[SkipPlan], context: int) -> Work:
        """Count a decode step in which each plan has a row with so many tokens of context."""
        config = shape.config
        decoder = decoder_shape(shape)
        runs = ~np.array([plan.mask() for plan in plans])
        per_sub_layer = np.tile(
            [decoder.attention_parameters, decoder.mlp_parameters], decoder.num_layers
        )
        head = config["vocab_size"] * config["hidden_size"]
        heads = config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        size = config.get("head_dim") or config["hidden_size"] // heads
        attended = int(runs[:, 0::2].sum()) * context
        return cls(
            weight_bytes=_SIZE * (int((runs.any(axis=0) * per_sub_layer).sum()) + head),
            kv_bytes=_SIZE * 2 * kv_heads * size * attended,
            operations=2 * (int((runs @ per_sub_layer).sum()) + head * len(plans))
            + 4 * heads * size * attended,
        )


def decoder_shape(shape: Shape) -> DecoderShape:
    """Return what plans of this model are weighed against."""
    from transformers import AutoConfig

    return FAMILIES[shape.family].shape(AutoConfig.for_model(**shape.config))
