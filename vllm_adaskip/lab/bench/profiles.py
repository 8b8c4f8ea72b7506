# SPDX-License-Identifier: Apache-2.0
"""A FiRST profile whose routers nobody trained: deciding with it costs the same."""

from __future__ import annotations

from pathlib import Path


def untrained_first(folder: Path, model: str, width: int = 0) -> str:
    """Write a profile for the model in a folder, with routers of so many hidden units."""
    from transformers import AutoConfig

    from vllm_adaskip.classifiers.first.routers import Routers
    from vllm_adaskip.classifiers.profile import Profile, fingerprint

    config = AutoConfig.from_pretrained(model).to_dict()
    profile = Profile(method="first", model=model, fingerprint=fingerprint(config))
    profile.save(folder)
    Routers(config["num_hidden_layers"], config["hidden_size"], width).save(folder)
    return str(folder)
