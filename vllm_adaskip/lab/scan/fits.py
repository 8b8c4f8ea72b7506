# SPDX-License-Identifier: Apache-2.0
"""Whether a model can be scanned here: found, of a family that we serve, not too large."""

from __future__ import annotations

import json
import os
from pathlib import Path

from vllm_adaskip.classifiers.plan import DecoderShape
from vllm_adaskip.lab.bench.machine import memory_available
from vllm_adaskip.lab.models import model_path
from vllm_adaskip.model_executors.registry import FAMILIES, family_of

#: What is read of a model on the hub.
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
#: Bytes of the KV caches of both engines, and of Python with all its libraries.
_BESIDE = 4 << 30


class ModelError(ValueError):
    """A model that cannot be scanned; the message names it and says why."""


def found_model(name: str) -> str:
    """Return the folder of a model, downloaded if its name is a short one or a hub id.

    Raises:
        ModelError: no such model.

    """
    if os.path.isdir(name := model_path(name)):  # unlike Path, which raises if it is too long
        return name
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return str(snapshot_download(name, allow_patterns=_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"model {name!r:.200}: no such folder, and the hub: {reason}") from None


def family_shape(folder: str) -> DecoderShape:
    """Return the shape of a model of a family that we serve.

    Raises:
        ModelError: of another family, or no model.

    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"{folder}: no model that transformers knows: {reason}") from None
    names = getattr(config, "architectures", None) or []
    if (family := family_of(*names)) is None:
        raise ModelError(
            f"{folder}: of the family {' or '.join(names) or '?'}, in which vllm-adaskip cannot "
            f"skip; supported: {', '.join(FAMILIES)}"
        )
    return family.shape(config)


def check_memory(folder: str, available: int | None = None) -> None:
    """Refuse a model that does not fit twice as it is stored, and once as float32.

    Raises:
        ModelError: so much memory is not available.

    """
    weights = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    if not weights:
        raise ModelError(f"{folder}: no weights; allowed: a model with *.safetensors")
    config = json.loads((Path(folder) / "config.json").read_text())
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    needed = weights * (2 + (1 if stored == "float32" else 2)) + _BESIDE
    there = memory_available() if available is None else available
    if needed > there:
        raise ModelError(
            f"{folder}: weights of {weights / 1e9:.1f} GB; a scan needs about {needed / 1e9:.1f} "
            f"GB of memory (stock vLLM, ours, and float32 in transformers), and "
            f"{there / 1e9:.1f} GB are available"
        )
