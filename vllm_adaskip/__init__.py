# SPDX-License-Identifier: Apache-2.0
"""vllm-adaskip: layer skipping per sequence, inside vLLM's continuous batch.

Importing this package imports neither torch nor vLLM; names below load when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_adaskip.bundled import bundled_model, bundled_profile
    from vllm_adaskip.classifiers.base import Classifier, MethodOptions, PromptStatistics
    from vllm_adaskip.classifiers.plan import DecoderShape, PlanError, SkipPlan
    from vllm_adaskip.lab.models import get_model
    from vllm_adaskip.launch import engine_args
    from vllm_adaskip.offline import report, request

__version__ = "0.1.0"

_HOMES = {
    "Classifier": "vllm_adaskip.classifiers.base",
    "DecoderShape": "vllm_adaskip.classifiers.plan",
    "MethodOptions": "vllm_adaskip.classifiers.base",
    "PlanError": "vllm_adaskip.classifiers.plan",
    "PromptStatistics": "vllm_adaskip.classifiers.base",
    "SkipPlan": "vllm_adaskip.classifiers.plan",
    "bundled_model": "vllm_adaskip.bundled",
    "bundled_profile": "vllm_adaskip.bundled",
    "engine_args": "vllm_adaskip.launch",
    "get_model": "vllm_adaskip.lab.models",
    "report": "vllm_adaskip.offline",
    "request": "vllm_adaskip.offline",
}

__all__ = [
    "Classifier",
    "DecoderShape",
    "MethodOptions",
    "PlanError",
    "PromptStatistics",
    "SkipPlan",
    "bundled_model",
    "bundled_profile",
    "engine_args",
    "get_model",
    "report",
    "request",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
