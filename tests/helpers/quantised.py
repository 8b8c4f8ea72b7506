# SPDX-License-Identifier: Apache-2.0
"""Quantised copies of a trained checkpoint, and the dequantised one that each stands for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.batches import Entries
from helpers.reference import Reference

#: Input columns that share a scale in the 4-bit formats.
GROUP = 32
#: AWQ's order of eight output columns in an int32.
_AWQ = [0, 2, 4, 6, 1, 3, 5, 7]

#: Ends an answer of the bundled model.
END = 1
#: Largest distance of the two best logits at which a token may differ.
NEAR = {"W8A8 int8": 1.0, "W4A16 int4": 0.25, "GPTQ int4": 0.25, "AWQ int4": 0.25}

#: With AVX2 alone vLLM has no kernels for four bits, for experts, beside adapters or for fp8, and
#: in int8 stock vLLM itself is far from the float32 loop.
needs_avx512 = pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(), reason="vLLM's kernels for it want AVX-512"
)

#: ``[out, in]`` float32 -> tensors by the ends of their names, and the weight they stand for.
Quantise = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]


def write(source: str, folder: Path, kind: str) -> tuple[str, str]:
    """Write a checkpoint quantised and dequantised, and return both folders."""
    quantise, config = KINDS[kind]
    packed, plain = {}, {}
    for name, weight in load_file(Path(source) / "model.safetensors").items():
        stem, _, end = name.rpartition(".")
        if end != "weight" or not stem.endswith(("_proj", ".fc1", ".fc2")):
            packed[name] = plain[name] = weight
            continue
        tensors, stands_for = quantise(weight.float())
        packed |= {f"{stem}.{end}": tensor.contiguous() for end, tensor in tensors.items()}
        plain[name] = stands_for.contiguous()
    paths = folder / kind, folder / f"{kind}-dequantised"
    for path, weights, more in zip(paths, (packed, plain), (config, None), strict=True):
        shutil.copytree(source, path, ignore=shutil.ignore_patterns("*.safetensors"))
        facts = json.loads((path / "config.json").read_text())
        facts |= {} if more is None else {"quantization_config": more}
        (path / "config.json").write_text(json.dumps(facts))
        save_file(weights, path / "model.safetensors", {"format": "pt"})
    return str(paths[0]), str(paths[1])


def int8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """One scale a row; activations are quantised as they come."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    values = (weight / scale).round().to(torch.int8)
    return {"weight": values, "weight_scale": scale}, values * scale


def grouped(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return values from -8 to 7 ``[out, in]``, scales ``[out, in / GROUP]``, what they mean."""
    parts = weight.unflatten(1, (-1, GROUP))
    scale = (parts.abs().amax(dim=2, keepdim=True) / 7).bfloat16().float()
    values = (parts / scale).round().clamp(-8, 7)
    return values.flatten(1).int(), scale[..., 0], (values * scale).flatten(1)


def packed(values: Tensor) -> Tensor:
    """Pack eight of 0 to 15 along the last dimension into an int32, the first lowest."""
    nibbles = values.long().unflatten(-1, (-1, 8)) << torch.arange(0, 32, 4)
    return nibbles.sum(dim=-1).to(torch.int32)


def int4(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    values, scale, stands_for = grouped(weight)
    tensors = {
        "weight_packed": packed(values + 8),
        "weight_scale": scale.bfloat16(),
        "weight_shape": torch.tensor(weight.shape),
    }
    return tensors, stands_for


def gptq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    values, scale, stands_for = grouped(weight)
    zeros = torch.full((scale.shape[1], weight.shape[0]), 7)  # GPTQ stores them less one
    tensors = {
        "qweight": packed(values + 8).T,
        "qzeros": packed(zeros),
        "scales": scale.T.bfloat16(),
        "g_idx": (torch.arange(weight.shape[1]) // GROUP).int(),
    }
    return tensors, stands_for


def awq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    values, scale, stands_for = grouped(weight)

    def in_order(columns: Tensor) -> Tensor:
        return packed(columns.unflatten(-1, (-1, 8))[..., _AWQ].flatten(-2))

    zeros = torch.full((scale.shape[1], weight.shape[0]), 8)
    tensors = {
        "qweight": in_order((values + 8).T.contiguous()),
        "qzeros": in_order(zeros),
        "scales": scale.T.bfloat16(),
    }
    return tensors, stands_for


def _compressed(
    form: str, weights: dict[str, Any], inputs: dict[str, Any] | None
) -> dict[str, Any]:
    common = {"type": "int", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**common, **weights},
                "input_activations": inputs and {**common, **inputs},
            }
        },
    }


#: Kind -> how it is made, and the checkpoint's ``quantization_config``.
KINDS: dict[str, tuple[Quantise, dict[str, Any]]] = {
    "W8A8 int8": (
        int8,
        _compressed(
            "int-quantized",
            {"num_bits": 8, "strategy": "channel"},
            {"num_bits": 8, "strategy": "token", "dynamic": True},
        ),
    ),
    "W4A16 int4": (
        int4,
        _compressed(
            "pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": GROUP}, None
        ),
    ),
    "GPTQ int4": (
        gptq,
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
    ),
    "AWQ int4": (
        awq,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True},
    ),
}


def equal(
    kind: str,
    reference: Reference,
    prompts: Sequence[list[int]],
    plans: Sequence[Entries],
    got: Sequence[list[int]],
    kv_fill: str,
) -> int:
    """Return how many answers are the reference's to their ends.

    The others must part where the reference's two best logits are near each other.
    """
    found = 0
    for prompt, plan, tokens in zip(prompts, plans, got, strict=True):
        want, _ = reference.generate(prompt, plan, len(tokens), kv_fill=kv_fill)
        # Behind the end of its answer a model has nothing that it would rather say.
        want = want[: want.index(END) + 1] if END in want else want
        pairs = zip(tokens[: len(want)], want, strict=True)
        differing = [at for at, (one, other) in enumerate(pairs) if one != other]
        if not differing:
            found += 1
            continue
        _, gap = reference.generate(prompt, plan, differing[0] + 1, kv_fill=kv_fill)
        assert gap < NEAR[kind], f"{plan} parts at token {differing[0]}, gap {gap:.2f}"
    return found
