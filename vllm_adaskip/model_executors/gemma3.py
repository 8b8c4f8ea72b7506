# SPDX-License-Identifier: Apache-2.0
"""Gemma 3: norms on both sides of each sub-layer, and of each head's query and key."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.model_executor.models.gemma3 import Gemma3ForCausalLM

from vllm_adaskip.classifiers import Stream
from vllm_adaskip.model_executors.llama_layers import add_and_norm
from vllm_adaskip.model_executors.qwen3 import NormedKeys


class AdaSkipGemma3ForCausalLM(NormedKeys, Gemma3ForCausalLM):
    """vLLM's Gemma 3 for text, with a skip plan per sequence."""

    def run_attention(self, layer: Any, positions: Tensor, stream: Stream) -> Stream:
        """Run input norm, self-attention and the norm behind it."""
        update, before = super().run_attention(layer, positions, stream)
        return Stream(layer.post_attention_layernorm(update), before)

    def run_mlp(self, layer: Any, stream: Stream) -> Stream:
        """Run the norm before the MLP, the MLP and the norm behind it."""
        normed, before = add_and_norm(layer.pre_feedforward_layernorm, stream)
        return Stream(layer.post_feedforward_layernorm(layer.mlp(normed)), before)
