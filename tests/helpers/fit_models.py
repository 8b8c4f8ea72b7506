# SPDX-License-Identifier: Apache-2.0
"""What the tests of fits share: tiny models, and questions that a model answers its own way."""

from __future__ import annotations

from typing import Any

import torch

from vllm_adaskip.lab.fitting.samples import Sample

VOCABULARY = 64


def tiny(family: str, layers: int = 4) -> Any:
    """Return a random model of a family, with large weights: every layer changes what it says."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
    }
    if family == "opt":
        # OPT's own name for it; dropout and layer dropout are for training only.
        shape |= {"init_std": 0.2, "ffn_dim": 64, "word_embed_proj_dim": 32}
    else:
        shape |= {"intermediate_size": 64, "num_key_value_heads": 1}
    if family == "qwen3":
        shape["head_dim"] = 16
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **shape, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def useless(model: Any, layer: int) -> None:
    """Make a Llama's decoder layer add nothing to the stream."""
    one = model.model.layers[layer]
    with torch.no_grad():
        one.self_attn.o_proj.weight.zero_()
        one.mlp.down_proj.weight.zero_()


@torch.no_grad()
def own_answers(model: Any, count: int, length: int = 4) -> list[Sample]:
    """Return random prompts with the answers that the whole model gives."""
    draw = torch.Generator().manual_seed(3)
    samples = []
    for number in range(count):
        size = 3 + number % 5
        ids = torch.randint(3, VOCABULARY, (size,), generator=draw).tolist()
        for _ in range(length):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        samples.append(Sample(f"size {size % 2}", ids, length))
    return samples
