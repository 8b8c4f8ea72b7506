# SPDX-License-Identifier: Apache-2.0
"""The sub-layers of transformers' models, one by one: what the families' references differ in.

Hidden states are ``[1, tokens, hidden]``. A sub-layer's update is what it adds to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as phi3_rotary


class LlamaDecoder:
    """Llama, Mistral, Qwen 2: norm, then attention or MLP; rotary embeddings."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.stack = model.model

    def embed(self, tokens: Sequence[int], positions: Sequence[int]) -> tuple[Tensor, Any]:
        """Return the stream before the first layer, and what `attention` must know of positions."""
        hidden = self.stack.embed_tokens(torch.tensor([list(tokens)]))
        return hidden, self.stack.rotary_emb(hidden, torch.tensor([list(positions)]))

    def attention(
        self,
        index: int,
        hidden: Tensor,
        where: Any,
        cache: DynamicCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        layer = self.stack.layers[index]
        update: Tensor = layer.self_attn(
            layer.input_layernorm(hidden),
            position_embeddings=where,
            attention_mask=self._windowed(index, mask),
            past_key_values=cache,
        )[0]
        return update

    def _windowed(self, index: int, mask: Tensor | None) -> Tensor | None:
        """Hide from each token what lies behind its layer's sliding window, if it has one."""
        config = self.model.config
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None)
        if mask is None or window is None or (kinds and kinds[index] == "full_attention"):
            return mask
        held = mask.shape[-1] - mask.shape[-2]  # tokens that its cache has of before
        return mask + torch.full_like(mask, float("-inf")).tril(held - window)

    def key_value(self, index: int, hidden: Tensor, where: Any) -> tuple[Tensor, Tensor]:
        """Return what attention writes into the cache, ``[1, kv_heads, tokens, head_size]``."""
        layer = self.stack.layers[index]
        attention, normed = layer.self_attn, layer.input_layernorm(hidden)
        key, value = (
            project(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for project in (attention.k_proj, attention.v_proj)
        )
        key = self.normed_key(attention, key)
        return apply_rotary_pos_emb(key, key, *where)[1], value

    def normed_key(self, attention: Any, key: Tensor) -> Tensor:
        return key

    def mlp(self, index: int, hidden: Tensor) -> Tensor:
        layer = self.stack.layers[index]
        update: Tensor = layer.mlp(layer.post_attention_layernorm(hidden))
        return update

    def logits(self, hidden: Tensor) -> Tensor:
        """Run the final norm and the head on the stream after any layer."""
        logits: Tensor = self.model.lm_head(self.stack.norm(hidden))
        return logits


class Phi3Decoder(LlamaDecoder):
    """Phi-3: one projection for q, k and v; rotary embeddings of a part of each head."""

    def key_value(self, index: int, hidden: Tensor, where: Any) -> tuple[Tensor, Tensor]:
        layer = self.stack.layers[index]
        heads = layer.self_attn.qkv_proj(layer.input_layernorm(hidden)).unflatten(
            -1, (-1, layer.self_attn.head_dim)
        )
        key, value = heads.transpose(1, 2)[:, -2 * self.model.config.num_key_value_heads :].chunk(
            2, dim=1
        )
        return phi3_rotary(key, key, *where)[1], value


class Qwen3Decoder(LlamaDecoder):
    """Qwen 3: each head's key has a norm."""

    def normed_key(self, attention: Any, key: Tensor) -> Tensor:
        normed: Tensor = attention.k_norm(key)
        return normed


class Gemma3Decoder(Qwen3Decoder):
    """Gemma 3: norms behind sub-layers too; other rotary embeddings and masks for windows."""

    def embed(self, tokens: Sequence[int], positions: Sequence[int]) -> tuple[Tensor, Any]:
        hidden = self.stack.embed_tokens(torch.tensor([list(tokens)]))
        at, kinds = torch.tensor([list(positions)]), set(self.model.config.layer_types)
        return hidden, {kind: self.stack.rotary_emb(hidden, at, kind) for kind in kinds}

    def attention(
        self,
        index: int,
        hidden: Tensor,
        where: Any,
        cache: DynamicCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        own = where[self.model.config.layer_types[index]]
        update = super().attention(index, hidden, own, cache, mask)
        after: Tensor = self.stack.layers[index].post_attention_layernorm(update)
        return after

    def key_value(self, index: int, hidden: Tensor, where: Any) -> tuple[Tensor, Tensor]:
        return super().key_value(index, hidden, where[self.model.config.layer_types[index]])

    def mlp(self, index: int, hidden: Tensor) -> Tensor:
        layer = self.stack.layers[index]
        update: Tensor = layer.mlp(layer.pre_feedforward_layernorm(hidden))
        after: Tensor = layer.post_feedforward_layernorm(update)
        return after


class OptDecoder:
    """OPT: learned positions; norms before, or after the sum."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.stack = model.model.decoder

    def embed(self, tokens: Sequence[int], positions: Sequence[int]) -> tuple[Tensor, Any]:
        hidden = self.stack.embed_tokens(torch.tensor([list(tokens)]))
        if self.stack.project_in is not None:
            hidden = self.stack.project_in(hidden)
        learned = self.stack.embed_positions.weight[torch.tensor([list(positions)]) + 2]
        return hidden + learned, None

    def attention(
        self,
        index: int,
        hidden: Tensor,
        where: Any,
        cache: DynamicCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        layer = self.stack.layers[index]
        norm, run = layer.self_attn_layer_norm, layer.self_attn
        if layer.do_layer_norm_before:
            update: Tensor = run(norm(hidden), past_key_values=cache, attention_mask=mask)[0]
            return update
        after: Tensor = norm(hidden + run(hidden, past_key_values=cache, attention_mask=mask)[0])
        return after - hidden

    def key_value(self, index: int, hidden: Tensor, where: Any) -> tuple[Tensor, Tensor]:
        layer = self.stack.layers[index]
        if layer.do_layer_norm_before:
            hidden = layer.self_attn_layer_norm(hidden)
        attention = layer.self_attn
        key, value = (
            project(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for project in (attention.k_proj, attention.v_proj)
        )
        return key, value

    def mlp(self, index: int, hidden: Tensor) -> Tensor:
        layer = self.stack.layers[index]
        norm = layer.final_layer_norm
        x = norm(hidden) if layer.do_layer_norm_before else hidden
        update: Tensor = layer.fc2(layer.activation_fn(layer.fc1(x)))
        return update if layer.do_layer_norm_before else norm(hidden + update) - hidden

    def logits(self, hidden: Tensor) -> Tensor:
        if self.stack.final_layer_norm is not None:
            hidden = self.stack.final_layer_norm(hidden)
        if self.stack.project_out is not None:
            hidden = self.stack.project_out(hidden)
        logits: Tensor = self.model.lm_head(hidden)
        return logits


Decoder = LlamaDecoder | OptDecoder
#: transformers' ``model_type`` -> how its sub-layers are run.
DECODERS: dict[str, type[LlamaDecoder] | type[OptDecoder]] = {
    "gemma3_text": Gemma3Decoder,
    "llama": LlamaDecoder,
    "mistral": LlamaDecoder,
    "opt": OptDecoder,
    "phi3": Phi3Decoder,
    "qwen2": LlamaDecoder,
    "qwen3": Qwen3Decoder,
    "qwen3_moe": Qwen3Decoder,
}
