# SPDX-License-Identifier: Apache-2.0
"""Qwen 3: each head's query and key have an RMS norm of their own, before they are rotated."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from vllm_adaskip.model_executors.llama_layers import LlamaLayers


class NormedKeys(LlamaLayers):
    """Layers of Qwen 3, whose MLPs may be mixtures of experts."""

    def before_rotary(self, attention: Any, key: Tensor) -> Tensor:
        """Norm each head's key."""
        heads = key.view(-1, attention.num_kv_heads, attention.head_dim)
        normed: Tensor = attention.k_norm(heads).view(key.shape)
        return normed


class AdaSkipQwen3ForCausalLM(NormedKeys, Qwen3ForCausalLM):
    """vLLM's Qwen 3 with a skip plan per sequence."""
