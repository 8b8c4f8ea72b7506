# SPDX-License-Identifier: Apache-2.0
"""The engines that are tortured, and the model they run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from helpers.tiny import write_llama

from vllm_adaskip import bundled_model, engine_args

LAYERS = 8
VOCABULARY = 473
#: The longest prompt. With what is generated it fits the smallest cache, once.
LONGEST_PROMPT = 200
MAX_MODEL_LEN = 256
#: For each way to fill K/V, and one that drafts: chunk, cache and batch, so that these differ too.
ENGINES: dict[str, dict[str, Any]] = {
    "none": {"max_num_batched_tokens": 32, "num_gpu_blocks_override": 16, "max_num_seqs": 8},
    "copy": {"max_num_batched_tokens": 48, "num_gpu_blocks_override": 20, "max_num_seqs": 12},
    "project": {"max_num_batched_tokens": 256, "num_gpu_blocks_override": 24, "max_num_seqs": 16},
    "drafts": {"max_num_batched_tokens": 48, "num_gpu_blocks_override": 20, "max_num_seqs": 12},
}
#: Our options of each.
OPTIONS: dict[str, dict[str, Any]] = {
    **{kv_fill: {"kv_fill": kv_fill} for kv_fill in ("none", "copy", "project")},
    "drafts": {
        "kv_fill": "copy",
        "draft": {"skip": ["mlp:3", "attn:5"], "tokens": 3, "adapt": False},
    },
}


def engine_options(name: str) -> dict[str, Any]:
    """Keyword arguments of `vllm.LLM`: float32, tiny blocks, and far too few of them."""
    return {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": MAX_MODEL_LEN,
        "block_size": 32,  # the smallest that the CPU backend takes
        "enable_prefix_caching": True,
        "disable_log_stats": False,
        "skip_tokenizer_init": False,  # stop strings need a tokenizer
        "distributed_executor_backend": "uni",
        **ENGINES[name],
        **engine_args(**OPTIONS[name]),
    }


def write_model(path: Path) -> str:
    """Write a random Llama that speaks the bundled model's words."""
    write_llama(
        path,
        layers=LAYERS,
        vocab_size=VOCABULARY,
        max_position_embeddings=MAX_MODEL_LEN,
        bos_token_id=None,
        eos_token_id=1,
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(bundled_model()) / name, path)
    return str(path)
