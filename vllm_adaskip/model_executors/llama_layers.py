# SPDX-License-Identifier: Apache-2.0
"""Decoder layers laid out as Llama's: what Llama, Mistral and Qwen have in common.

An RMS norm before attention and one before the MLP, into which vLLM fuses the sum of the
residual pair; rotary embeddings; the same names of modules.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vllm_adaskip.classifiers import Stream
from vllm_adaskip.engine.compat.projection import project
from vllm_adaskip.engine.loop import SkippingDecoder


class LlamaLayers(SkippingDecoder):
    """Mixin before vLLM's class of such a family."""

    def run_attention(self, layer: Any, positions: Tensor, stream: Stream) -> Stream:
        """Run input norm and self-attention."""
        normed, before = add_and_norm(layer.input_layernorm, stream)
        return Stream(layer.self_attn(positions=positions, hidden_states=normed), before)

    def run_mlp(self, layer: Any, stream: Stream) -> Stream:
        """Run post-attention norm and MLP."""
        normed, before = add_and_norm(layer.post_attention_layernorm, stream)
        return Stream(layer.mlp(normed), before)

    def project_kv(self, layer: Any, positions: Tensor, stream: Stream) -> tuple[Tensor, Tensor]:
        """Run input norm, K/V projection and rotary embedding."""
        attention = layer.self_attn
        normed, _ = add_and_norm(layer.input_layernorm, stream)
        query, key, value = project(attention.qkv_proj, normed)
        _, key = attention.rotary_emb(positions, query, self.before_rotary(attention, key))
        return key, value

    def before_rotary(self, attention: Any, key: Tensor) -> Tensor:
        """Do to keys ``[tokens, kv_heads * head_size]`` what attention does before it rotates."""
        return key

    def finish(self, stream: Stream) -> Tensor:
        """Run the final norm."""
        return add_and_norm(self.stack.norm, stream)[0]


def add_and_norm(norm: nn.Module, stream: Stream) -> tuple[Tensor, Tensor]:
    """Return ``(normed, stream)``, as a vLLM layer makes them; the first has nothing to add."""
    update, before = stream
    if before is None:
        return norm(update), update
    normed, whole = norm(update, before)
    return normed, whole
