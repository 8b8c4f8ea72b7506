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


def experts_shape(hf_config: Any) -> DecoderShape:
    """Count what a token runs: attention's projections; the router, and the experts it picks."""
    hidden, experts = hf_config.hidden_size, hf_config.num_experts
    attention = llama_shape(hf_config).attention_parameters
    mlp = 3 * hidden * hf_config.moe_intermediate_size * hf_config.num_experts_per_tok
    return DecoderShape(hf_config.num_hidden_layers, attention, mlp + hidden * experts)


def opt_shape(hf_config: Any) -> DecoderShape:
    """Count parameters of the projections: q, k, v, out; fc1, fc2."""
    hidden = hf_config.hidden_size
    return DecoderShape(
        num_layers=hf_config.num_hidden_layers,
        attention_parameters=4 * hidden * hidden,
        mlp_parameters=2 * hidden * hf_config.ffn_dim,
    )


def _family(name: str, module: str, shape: Callable[[Any], DecoderShape]) -> Family:
    ours = f"AdaSkip{name}ForCausalLM"
    return Family(ours, f"vllm_adaskip.model_executors.{module}:{ours}", shape)


#: vLLM's architecture -> the family that serves it.
FAMILIES: dict[str, Family] = {
    "Gemma3ForCausalLM": _family("Gemma3", "gemma3", llama_shape),
    "LlamaForCausalLM": _family("Llama", "llama", llama_shape),
    "MistralForCausalLM": _family("Mistral", "mistral", llama_shape),
    "OPTForCausalLM": _family("OPT", "opt", opt_shape),
    "Phi3ForCausalLM": _family("Phi3", "phi3", llama_shape),
    "Qwen2ForCausalLM": _family("Qwen2", "qwen2", llama_shape),
    "Qwen3ForCausalLM": _family("Qwen3", "qwen3", llama_shape),
    "Qwen3MoeForCausalLM": _family("Qwen3Moe", "qwen3_moe", experts_shape),
}


def family_of(*architectures: str) -> Family | None:
    """Return the family of the first of these that has one, stock architectures or ours."""
    for architecture in architectures:
        for stock, family in FAMILIES.items():
            if architecture in (stock, family.architecture):
                return family
    return None
