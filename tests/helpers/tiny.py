# SPDX-License-Identifier: Apache-2.0
"""Tiny random models with large weights, for tests that need a model of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_llama(path: Path, *, layers: int, **config: Any) -> str:
    """Write a checkpoint without a tokenizer; grouped-query attention, always the same weights.

    Random weights are good here: any mistake in what runs changes the tokens at once.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.1,
        tie_word_embeddings=False,
        **config,
    )
    LlamaForCausalLM(shape).save_pretrained(path)
    return str(path)


def write_model(path: Path, family: str, **config: Any) -> str:
    """Write a checkpoint of any family that transformers knows; biases and norms random too."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    std = "init_std" if family == "opt" else "initializer_range"
    torch.manual_seed(0)
    shape = AutoConfig.for_model(
        family,
        **{"vocab_size": 512, "max_position_embeddings": 512, std: 0.1, **config},
        pad_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(shape)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # made as ones and zeros, which hide code that forgets them
            torch.nn.init.normal_(parameter, float("norm.weight" in name), 0.2)
    model.save_pretrained(path)
    return str(path)
