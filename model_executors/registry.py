# SPDX-License-Identifier: Apache-2.0
"""The families we can skip in: vLLM's architecture, our class, what a sub-layer weighs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_adaskip.classifiers import DecoderShape


@dataclass(frozen=True)
class Family:
    """One family; ``target`` is ``module:Class`` so that nothing is imported to register it."""

    architecture: str
    target: str
    shape: Callable[[Any], DecoderShape]


def llama_shape(hf_config: Any) -> DecoderShape:
    """Count parameters of the projections: q, k, v, o; gate, up, down."""
    hidden, heads = hf_config.hidden_size, hf_config.num_attention_heads
    kv_heads = getattr(hf_config, "num_key_value_heads", None) or heads
    head_size = getattr(hf_config, "head_dim", None) or hidden // heads
    return DecoderShape(
        num_layers=hf_config.num_hidden_layers,
        attention_parameters=2 * hidden * head_size * (heads + kv_heads),
        mlp_parameters=3 * hidden * hf_config.intermediate_size,
    )


#: vLLM's architecture -> the family that serves it.
FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(
        "AdaSkipLlamaForCausalLM",
        "vllm_adaskip.model_executors.llama:AdaSkipLlamaForCausalLM",
        llama_shape,
    ),
}


def family_of(architecture: str) -> Family | None:
    """Give the family of a stock architecture, or of one of ours."""
    for stock, family in FAMILIES.items():
        if architecture in (stock, family.architecture):
            return family
    return None
