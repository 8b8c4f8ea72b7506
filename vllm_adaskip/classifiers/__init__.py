# SPDX-License-Identifier: Apache-2.0
"""Methods that decide skip plans. Never imports vLLM."""

from vllm_adaskip.classifiers.adainfer.method import AdaInfer
from vllm_adaskip.classifiers.base import (
    Classifier,
    MethodOptions,
    Observe,
    PromptStatistics,
    Scope,
)
from vllm_adaskip.classifiers.dense import Dense
from vllm_adaskip.classifiers.early_exit import EarlyExit
from vllm_adaskip.classifiers.ffn_skip.method import FfnSkip
from vllm_adaskip.classifiers.first.method import First
from vllm_adaskip.classifiers.gates import Gate, Lens, Look, Stream
from vllm_adaskip.classifiers.plan import DecoderShape, PlanError, SkipPlan
from vllm_adaskip.classifiers.similarity.method import Similarity
from vllm_adaskip.classifiers.static.method import Static

#: Every method by the name that users write, hyphens included.
METHODS: dict[str, type[Classifier]] = {
    "adainfer": AdaInfer,
    "exit": EarlyExit,
    "ffn-skip": FfnSkip,
    "first": First,
    "none": Dense,
    "similarity": Similarity,
    "static": Static,
}

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
]
