# SPDX-License-Identifier: Apache-2.0
"""Methods that decide skip plans. Never imports vLLM."""

from vllm_adaskip.classifiers.base import (
    Classifier,
    MethodOptions,
    Observe,
    PromptStatistics,
    Scope,
)
from vllm_adaskip.classifiers.gates import Gate, Lens, Look, Stream
from vllm_adaskip.classifiers.methods import METHODS, method_of
from vllm_adaskip.classifiers.plan import DecoderShape, PlanError, SkipPlan

__all__ = [
    "METHODS",
    "Classifier",
    "DecoderShape",
    "Gate",
    "Lens",
    "Look",
    "MethodOptions",
    "Observe",
    "PlanError",
    "PromptStatistics",
    "Scope",
    "SkipPlan",
    "Stream",
    "method_of",
]
