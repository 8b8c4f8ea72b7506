# SPDX-License-Identifier: Apache-2.0
"""vllm-adaskip: layer skipping per sequence, inside vLLM's continuous batch.

Importing this package imports neither torch nor vLLM; names below load when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_adaskip.bundled import bundled_model, bundled_profile
    from vllm_adaskip.classifiers.plan import DecoderShape, SkipPlan
    from vllm_adaskip.lab.models import get_model
    from vllm_adaskip.launch import engine_args

__version__ = "0.1.0"

_HOMES = {
    "DecoderShape": "vllm_adaskip.classifiers.plan",
    "SkipPlan": "vllm_adaskip.classifiers.plan",
    "bundled_model": "vllm_adaskip.bundled",
    "bundled_profile": "vllm_adaskip.bundled",
    "engine_args": "vllm_adaskip.launch",
    "get_model": "vllm_adaskip.lab.models",
}

__all__ = [
    "DecoderShape",
    "SkipPlan",
    "bundled_model",
    "bundled_profile",
    "engine_args",
    "get_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
