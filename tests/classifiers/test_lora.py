# SPDX-License-Identifier: Apache-2.0
"""LoRA merged at load gives what peft's own merge gives; what cannot be merged is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.profiles import write_lora
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from vllm_adaskip.classifiers.lora import Lora
from vllm_adaskip.classifiers.profile import ProfileError


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_merged_as_peft_merges(tiny_llama: str, tmp_path: Path, rank_stabilised: bool) -> None:
    merged = write_lora(tmp_path, tiny_llama, use_rslora=rank_stabilised)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    lora = Lora.of(tmp_path)
    assert lora is not None
    weights = dict(lora.merged(model.state_dict().items()))
    want = load_file(Path(merged) / "model.safetensors")
    changed = 0
    for name, weight in want.items():
        torch.testing.assert_close(weights[name], weight)
        changed += not torch.equal(weight, model.state_dict()[name])
    assert changed == 8 * 7  # all projections of all layers


def test_a_profile_without_an_adapter(tmp_path: Path) -> None:
    assert Lora.of(tmp_path) is None


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"r": 0}, "r: "),
        ({"r": "many"}, "r: "),
    ],
)
def test_other_kinds_are_refused_by_name(
    tiny_llama: str, tmp_path: Path, change: dict[str, Any], word: str
) -> None:
    write_lora(tmp_path, tiny_llama)
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ProfileError, match=word):
        Lora.of(tmp_path)


def test_tampered_weights_are_refused(tiny_llama: str, tmp_path: Path) -> None:
    write_lora(tmp_path, tiny_llama)
    path = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(path)
    first, *_ = tensors
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    for change, word in (
        ({first: torch.full_like(tensors[first], float("inf"))}, "finite"),
        ({first: tensors[first].clone()[None]}, "ranks differ"),
        ({"evil": torch.zeros(1)}, "pairs"),
        ({first: tensors[first][:, :-1].contiguous()}, "does not fit"),
        ({first.replace("layers.0", "layers.99"): tensors[first].clone()}, "pairs"),
        (
            {one.replace("layers.0", "layers.99"): each.clone() for one, each in tensors.items()},
            "lacks",
        ),
    ):
        save_file({**tensors, **change}, path)
        with pytest.raises(ProfileError, match=word):
            lora = Lora.of(tmp_path)
            assert lora is not None
            list(lora.merged(model.state_dict().items()))
    path.write_bytes(b"\x80\x04pickle")
    with pytest.raises(ProfileError, match="lora"):
        Lora.of(tmp_path)
