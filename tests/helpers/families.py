# SPDX-License-Identifier: Apache-2.0
"""A tiny random checkpoint for each form that a family comes in, and its engines.

Head sizes are some of those that vLLM's CPU attention takes: 32, 64, 80, 96, 112, 128, 160, 192,
224, 256 and 512. It refuses all others itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from helpers.reference import Reference
from helpers.tiny import write_model
from vllm_adaskip import engine_args

LAYERS = 6
#: Generated tokens that run everything under a method that gates tokens.
WARM_UP = 2


@dataclass(frozen=True)
class Case:
    """One form of a family.

    Attributes:
        architecture: vLLM's, as in the registry.
        config: of the checkpoint, by transformers' names.
        engine: options that the engine needs for it.
        threshold: similarity at which a method that gates tokens tells some from others.
        forgets: all its layers have a sliding window.

    """

    architecture: str
    family: str
    config: dict[str, Any]
    engine: dict[str, Any] = field(default_factory=dict)
    threshold: float = 0.9
    forgets: bool = False


def _gated(heads: int, kv_heads: int, hidden: int = 128, **config: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": 192,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **config,
    }


def _opt(heads: int, hidden: int, **config: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "ffn_dim": 192,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": heads,
        "init_std": 0.3,
        **config,
    }


#: Multi-head and grouped-query attention, tied embeddings and untied, with biases and without.
CASES = {
    "gemma3": Case(
        "Gemma3ForCausalLM",
        "gemma3_text",
        _gated(
            4,
            2,
            head_dim=64,
            query_pre_attn_scalar=64,
            initializer_range=0.03,
            sliding_window=16,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
            tie_word_embeddings=True,
        ),
    ),
    "llama": Case(
        "LlamaForCausalLM",
        "llama",
        _gated(2, 2, head_dim=80, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    ),
    "mistral": Case(
        "MistralForCausalLM",
        "mistral",
        _gated(4, 1, head_dim=96, tie_word_embeddings=False, sliding_window=None),
    ),
    "mistral, with a window": Case(
        "MistralForCausalLM",
        "mistral",
        _gated(4, 2, tie_word_embeddings=False, sliding_window=20),
        forgets=True,
    ),
    "opt": Case(
        "OPTForCausalLM",
        "opt",
        _opt(4, 128, word_embed_proj_dim=128, tie_word_embeddings=True),
    ),
    "opt, post-norm and projections": Case(
        "OPTForCausalLM",
        "opt",
        _opt(
            2,
            160,
            word_embed_proj_dim=96,
            do_layer_norm_before=False,
            tie_word_embeddings=False,
        ),
        threshold=0.2,
    ),
    "opt, without biases": Case(
        "OPTForCausalLM",
        "opt",
        _opt(
            1,
            112,
            word_embed_proj_dim=64,
            enable_bias=False,
            layer_norm_elementwise_affine=False,
            _remove_final_layer_norm=True,
            tie_word_embeddings=True,
        ),
    ),
    "phi3": Case(
        "Phi3ForCausalLM",
        "phi3",
        _gated(4, 2, hidden=256, partial_rotary_factor=0.5, tie_word_embeddings=False),
    ),
    "qwen2": Case("Qwen2ForCausalLM", "qwen2", _gated(4, 2, hidden=256, tie_word_embeddings=True)),
    "qwen3": Case(
        "Qwen3ForCausalLM", "qwen3", _gated(6, 2, head_dim=112, tie_word_embeddings=False)
    ),
    "qwen3, experts": Case(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        _gated(
            4,
            2,
            head_dim=64,
            moe_intermediate_size=384,
            num_experts=4,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            tie_word_embeddings=False,
        ),
    ),
}


class Matrix:
    """Checkpoints, references and engines of all cases, each made once."""

    def __init__(self, folder: Path, engine: Callable[..., Any]) -> None:
        self._folder = folder
        self._engine = engine
        self.checkpoint = cache(self._checkpoint)
        self.reference = cache(self._reference)
        self.stock = cache(self._stock)
        self.plugin = cache(self._plugin)

    def _checkpoint(self, name: str) -> str:
        case = CASES[name]
        return write_model(self._folder / name.replace(", ", "-"), case.family, **case.config)

    def _reference(self, name: str) -> Reference:
        return Reference(self.checkpoint(name))

    def _stock(self, name: str) -> Any:
        return self.make(name)

    def _plugin(self, name: str, kv_fill: str) -> Any:
        """With each fill another way to decide for requests that bring no plan."""
        method: dict[str, Any] = {}  # no method; by the prompt; by each token
        if kv_fill == "copy" and not CASES[name].forgets:
            method = {"method": "adaskip"}
        elif kv_fill == "project":
            threshold = CASES[name].threshold
            method = {"method": "ffn-skip", "scope": "token", "threshold": threshold}
            method["warm_up"] = WARM_UP
        return self.make(name, **engine_args(kv_fill=kv_fill, **method))

    def make(self, name: str, *, model: str | None = None, **options: Any) -> Any:
        """Start an engine of a case, with another checkpoint of it if one is named."""
        if "num_experts" in CASES[name].config:
            # A process whose first model had no experts has no group for them.
            from vllm.distributed import destroy_model_parallel

            destroy_model_parallel()
        return self._engine(
            model or self.checkpoint(name),
            max_num_batched_tokens=64,
            kv_cache_memory_bytes=16 << 20,
            **CASES[name].engine,
            **options,
        )
