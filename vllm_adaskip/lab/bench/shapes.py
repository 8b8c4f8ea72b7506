# SPDX-License-Identifier: Apache-2.0
"""Decoders of real shapes with made-up weights and adapters, whole and with layers gone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_adaskip.lab.models import NAMES, model_path

#: Name -> a published config, as far as it decides what a step costs.
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49_152,
        "tie_word_embeddings": True,
    },
    "llama-400m": {
        "model_type": "llama",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 49_152,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128_256,
        "tie_word_embeddings": True,
    },
    "tinyllama-1.1b": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 32_000,
        "tie_word_embeddings": False,
    },
    "llama-3.1-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128_256,
        "tie_word_embeddings": False,
    },
    "opt-1.3b": {
        "model_type": "opt",
        "hidden_size": 2048,
        "ffn_dim": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "vocab_size": 50_272,
        "word_embed_proj_dim": 2048,
        "max_position_embeddings": 8192,
    },
}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "opt": "OPTForCausalLM"}
#: Length that every shape is given, so that long contexts can be timed.
POSITIONS = 8192
#: Of every made-up LoRA adapter.
RANK = 16


@dataclass(frozen=True)
class Shape:
    """A decoder's config, whose weights are made up when it is loaded: they cost the same.

    Attributes:
        name: as users write it.
        config: in transformers' keys, with ``model_type``.
        adapters: LoRA adapters that are written beside it, which requests take in turn.

    """

    name: str
    config: Mapping[str, Any]
    adapters: int = 0

    @classmethod
    def of(cls, name: str) -> Shape:
        """Return that of a short name, one of `SHAPES`, or that of a model's folder.

        Raises:
            ValueError: there is none of that name.

        """
        if name in SHAPES:
            return cls(name, {"max_position_embeddings": POSITIONS, **SHAPES[name]})
        folder = model_path(name)
        if not (Path(folder) / "config.json").is_file():
            raise ValueError(
                f"{name!r} is no model to time; allowed: {', '.join([*NAMES, *SHAPES])}, or "
                "a folder with a config.json"
            )
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder).to_dict()
        return cls(Path(name).name, {**config, "max_position_embeddings": POSITIONS})

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return int(self.config["num_hidden_layers"])

    @property
    def family(self) -> str:
        """Stock vLLM's architecture."""
        architectures = self.config.get("architectures") or [
            ARCHITECTURES[self.config["model_type"]]
        ]
        return str(architectures[0])

    def of_depth(self, layers: int) -> Shape:
        """Return the same with fewer layers, the others physically gone."""
        config = {**self.config, "num_hidden_layers": layers}
        return replace(self, name=f"{self.name}, {layers} layers", config=config)

    def write(self, folder: Path) -> str:
        """Write the config where an engine loads it from, and adapters; return that path."""
        from transformers import AutoConfig

        changed = {**self.config, "architectures": [self.family], "dtype": "bfloat16"}
        changed.pop("layer_types", None)
        config = AutoConfig.for_model(**changed)
        config.save_pretrained(folder)
        for number in range(self.adapters):
            _write_adapter(folder / f"adapter-{number}", config, number)
        return str(folder)


def adapters_beside(model: str) -> list[str]:
    """Return the folders of the LoRA adapters that were written beside a shape's config."""
    return sorted(str(file.parent) for file in Path(model).glob("adapter-*/adapter_config.json"))


def _write_adapter(folder: Path, config: Any, seed: int) -> None:
    """Write a made-up adapter of all linear layers but the head, in peft's format."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    random = torch.Generator().manual_seed(seed)
    pairs, targets = {}, set()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            targets.add(name.rpartition(".")[2])
            down, up = (RANK, module.in_features), (module.out_features, RANK)
            for end, size in (("A", down), ("B", up)):
                values = 0.01 * torch.randn(size, generator=random)
                pairs[f"base_model.model.{name}.lora_{end}.weight"] = values.bfloat16()
    folder.mkdir()
    save_file(pairs, folder / "adapter_model.safetensors")
    facts = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": sorted(targets)}
    (folder / "adapter_config.json").write_text(json.dumps(facts))
