# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters in peft's format, made up, and the checkpoints into which each is merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RANK, ALPHA = 4, 8
#: Of Llama's layout, and of OPT's.
TARGETS = [
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("out_proj", "fc1", "fc2"),
]


def write(source: str, folder: Path, count: int, strength: float = 0.5) -> list[tuple[str, str]]:
    """Write adapters for a checkpoint; return the folders of each, alone and merged.

    ``strength`` is how large an adapter's change of a weight is beside the weight.
    """
    weights = load_file(Path(source) / "model.safetensors")
    return [_write(source, weights, folder, seed, strength) for seed in range(count)]


def _write(
    source: str, weights: dict[str, torch.Tensor], folder: Path, seed: int, strength: float
) -> tuple[str, str]:
    alone, merged = folder / f"adapter-{seed}", folder / f"merged-{seed}"
    alone.mkdir()
    shutil.copytree(source, merged, ignore=shutil.ignore_patterns("*.safetensors"))
    random = torch.Generator().manual_seed(seed)
    pairs, sums = {}, dict(weights)
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if weight.ndim != 2 or module.rpartition(".")[2] not in TARGETS:
            continue
        down = torch.randn(RANK, weight.shape[1], generator=random)
        up = torch.randn(weight.shape[0], RANK, generator=random)
        change = ALPHA / RANK * (up @ down)
        size = strength * weight.float().norm() / change.norm()
        pairs[f"base_model.model.{module}.lora_A.weight"] = down
        pairs[f"base_model.model.{module}.lora_B.weight"] = size * up
        sums[name] = weight.float() + size * change
    save_file(pairs, alone / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS}
    (alone / "adapter_config.json").write_text(json.dumps(config))
    save_file(sums, merged / "model.safetensors", {"format": "pt"})
    return str(alone), str(merged)
