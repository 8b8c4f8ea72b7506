# SPDX-License-Identifier: Apache-2.0
"""Methods that decide skip plans. Never imports vLLM."""

from vllm_adaskip.classifiers.base import Classifier, MethodOptions, PromptStatistics
from vllm_adaskip.classifiers.dense import Dense
from vllm_adaskip.classifiers.plan import DecoderShape, PlanError, SkipPlan
from vllm_adaskip.classifiers.similarity import Similarity
from vllm_adaskip.classifiers.static import Static

#: Every method by the name that users write, hyphens included.
METHODS: dict[str, type[Classifier]] = {
    "none": Dense,
    "similarity": Similarity,
    "static": Static,
}

__all__ = [
    "METHODS",
    "Classifier",
    "DecoderShape",
    "MethodOptions",
    "PlanError",
    "PromptStatistics",
    "SkipPlan",
]
