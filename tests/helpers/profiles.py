# SPDX-License-Identifier: Apache-2.0
"""Profiles with random tensors: any mistake in what is read changes plans at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from vllm_adaskip.classifiers.adainfer.rules import ExitRule
from vllm_adaskip.classifiers.first.routers import Routers
from vllm_adaskip.classifiers.profile import Profile, fingerprint


def write_first(folder: Path, model: str, *, width: int = 0, **options: Any) -> str:
    """Write a profile of method ``first`` whose routers disagree about every token."""
    config = AutoConfig.from_pretrained(model).to_dict()
    torch.manual_seed(1)
    routers = Routers(config["num_hidden_layers"], config["hidden_size"], width)
    for parameter in routers.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    folder.mkdir(parents=True, exist_ok=True)
    routers.save(folder)
    Profile(method="first", options=options, model="tiny", fingerprint=fingerprint(config)).save(
        folder
    )
    return str(folder)


def write_adainfer(folder: Path, model: str, rule: ExitRule, **options: Any) -> str:
    """Write a profile of method ``adainfer`` with a rule of one's own."""
    config = AutoConfig.from_pretrained(model).to_dict()
    folder.mkdir(parents=True, exist_ok=True)
    rule.save(folder)
    Profile(
        method="adainfer",
        options={"classifier": type(rule).__name__.lower(), **options},
        model="tiny",
        fingerprint=fingerprint(config),
    ).save(folder)
    return str(folder)


def write_lora(folder: Path, model: str, **config: Any) -> str:
    """Add a random adapter in peft's format to a profile; give the model that peft makes of it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(2)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **config}),
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder / "lora")
    adapted.merge_and_unload().save_pretrained(folder / "merged")
    return str(folder / "merged")


def write_taught(folder: Path, model: str, skip: list[int | str] | None = None, **own: Any) -> str:
    """Write a profile with a random adapter for planned tokens; return the merged checkpoint."""
    merged = write_lora(folder, model, target_modules=r".*\.layers\.\d+\..*(_proj|fc\d)")
    config = AutoConfig.from_pretrained(model).to_dict()
    options = {} if skip is None else {"skip": skip}
    Profile(
        **{"method": "static", "options": options, "model": "tiny", "adapter": "planned", **own},
        fingerprint=fingerprint(config),
    ).save(folder)
    return merged
