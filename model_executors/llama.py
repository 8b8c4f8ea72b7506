# SPDX-License-Identifier: Apache-2.0
"""Llama: `LlamaForCausalLM` and the checkpoints that share its class."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.model_executor.models.llama import LlamaForCausalLM

from vllm_adaskip.model_executors.decoder import SkippingDecoder, Stream, add_and_norm


class AdaSkipLlamaForCausalLM(SkippingDecoder, LlamaForCausalLM):
    """vLLM's Llama with a skip plan per sequence."""

    def attention_of(self, layer: Any) -> Any:
        """Give the layer's vLLM `Attention` module."""
        return layer.self_attn.attn

    def run_attention(self, layer: Any, positions: Tensor, stream: Stream) -> Stream:
        """Run input norm and self-attention."""
        normed, residual = add_and_norm(layer.input_layernorm, stream)
        return layer.self_attn(positions=positions, hidden_states=normed), residual

    def project_kv(self, layer: Any, positions: Tensor, stream: Stream) -> tuple[Tensor, Tensor]:
        """Run input norm, q/k/v projection and rotary embedding; the query is left over."""
        attention = layer.self_attn
        normed, _ = add_and_norm(layer.input_layernorm, stream)
        sizes = [attention.q_size, attention.kv_size, attention.kv_size]
        query, key, value = attention.qkv_proj(normed)[0].split(sizes, dim=-1)
        _, key = attention.rotary_emb(positions, query, key)
        return key, value

    def run_mlp(self, layer: Any, stream: Stream) -> Stream:
        """Run post-attention norm and MLP."""
        normed, residual = add_and_norm(layer.post_attention_layernorm, stream)
        return layer.mlp(normed), residual
