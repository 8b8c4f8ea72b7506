# SPDX-License-Identifier: Apache-2.0
"""The Llama model, and the forward pass used in training."""

import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, apply_rotary_pos_emb


def create(
    tokenizer: PreTrainedTokenizerFast, layers: int = 12, hidden: int = 192
) -> LlamaForCausalLM:
    """Make a model with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        # Small first updates keep a deep stack calm at the start.
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_((2 * layers) ** -0.5)
            layer.mlp.down_proj.weight.mul_((2 * layers) ** -0.5)
    return model


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a bfloat16 copy that transformers and vLLM load as it is."""
    stored = LlamaForCausalLM(model.config)
    stored.load_state_dict(model.state_dict())
    stored = stored.to(torch.bfloat16)
    stored.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    stored.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def allowed(segments: Tensor) -> Tensor:
    """Which positions may attend to which: earlier ones of the same sample."""
    same = segments[:, :, None] == segments[:, None, :]
    return same & torch.ones(same.shape[1:], dtype=torch.bool).tril()


def _attend(
    layer: LlamaDecoderLayer, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor
) -> Tensor:
    attention = layer.self_attn
    batch, length, _ = x.shape
    size = attention.head_dim

    def heads(projected: Tensor) -> Tensor:
        return projected.view(batch, length, -1, size).transpose(1, 2)

    query, key = apply_rotary_pos_emb(
        heads(attention.q_proj(x)), heads(attention.k_proj(x)), *rotary
    )
    value = heads(attention.v_proj(x)).to(query.dtype)
    # Query heads that share a key head are stacked along the length, so nothing is copied.
    shared = key.shape[1]
    query = query.reshape(batch, shared, -1, size)
    scores = (query @ key.transpose(2, 3)).view(batch, shared, -1, length, length)
    scores = scores.float() * size**-0.5
    scores = scores.masked_fill(~mask[:, None, None], -1e9)
    weights = scores.softmax(dim=-1).to(value.dtype).view(batch, shared, -1, length)
    mixed = (weights @ value).view(batch, -1, length, size).transpose(1, 2)
    output: Tensor = attention.o_proj(mixed.reshape(batch, length, -1))
    return output


def forward(
    model: LlamaForCausalLM, ids: Tensor, positions: Tensor, segments: Tensor, gates: Tensor
) -> Tensor:
    """Logits, with each layer's update multiplied by its gate."""
    return head(model, streams(model, ids, positions, segments, gates)[-1])


def streams(
    model: LlamaForCausalLM, ids: Tensor, positions: Tensor, segments: Tensor, gates: Tensor
) -> list[Tensor]:
    """Return the residual stream `[batch, length, hidden]` behind each layer.

    `gates` is [layers, batch, length]: 1 keeps a layer for that token's sample, 0 drops it. It is
    the same computation as transformers' (a test compares them), but a compiled graph of it stays
    whole whatever the gates are, and several samples fit in one row.
    """
    x = model.model.embed_tokens(ids)
    rotary = model.model.rotary_emb(x, positions)
    mask = allowed(segments)
    found = []
    for layer, gate in zip(model.model.layers, gates.unsqueeze(-1), strict=True):
        x = x + gate * _attend(layer, layer.input_layernorm(x), rotary, mask)
        x = x + gate * layer.mlp(layer.post_attention_layernorm(x))
        found.append(x)
    return found


def head(model: LlamaForCausalLM, stream: Tensor) -> Tensor:
    """Return the logits that a stream gives, as if it left after the last layer."""
    logits: Tensor = model.lm_head(model.model.norm(stream))
    return logits


def answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy over the answers' tokens; other labels are -100."""
    return functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def exit_weights(layers: int, scale: float, every: int, step: int) -> Tensor:
    """Return LayerSkip's weight of each layer's loss (arXiv 2404.16710, section 4.1.2).

    It grows with depth: e_l = scale * (0 + ... + l), and e_(L-1) = L - 1 + scale * (0 + ... + L-2).
    By the rotating curriculum every so many layers leave in a step, the next ones in the next,
    and the last layer always. The weights of a step add up to 1; with scale 0 the last has all.
    """
    depth = torch.arange(layers).float()
    weights = scale * depth.cumsum(0)
    weights[(torch.arange(layers) - step) % every != 0] = 0.0
    weights[-1] = layers - 1 + scale * depth[:-1].sum()
    return weights / weights.sum()


def drop_probabilities(layers: int, p_max: float, progress: float) -> Tensor:
    """LayerSkip's layer dropout: grows with depth, and over the training from none to p_max.

    p_l = S(t) * (exp(l * ln2 / (L - 1)) - 1) * p_max with S(t) = exp(t * ln2 / (T - 1)) - 1.
    """
    time_scale = math.exp(progress * math.log(2)) - 1
    depth = torch.arange(layers) / max(layers - 1, 1)
    return time_scale * (torch.exp(depth * math.log(2)) - 1) * p_max


def sample_gates(probabilities: Tensor, segments: Tensor, generator: torch.Generator) -> Tensor:
    """One 0/1 gate per layer and sample, spread over the sample's tokens."""
    batch, length = segments.shape
    draws = torch.rand(len(probabilities), batch, length, generator=generator)
    per_sample = (draws >= probabilities[:, None, None]).float()
    index = segments.clamp(min=0).expand(len(probabilities), -1, -1)
    return per_sample.gather(2, index)
