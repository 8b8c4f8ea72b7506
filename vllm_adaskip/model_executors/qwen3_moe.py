# SPDX-License-Identifier: Apache-2.0
"""Qwen 3 with a mixture of experts: an MLP that is left out saves its router and experts."""

from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM

from vllm_adaskip.model_executors.qwen3 import NormedKeys


class AdaSkipQwen3MoeForCausalLM(NormedKeys, Qwen3MoeForCausalLM):
    """vLLM's Qwen 3 of experts with a skip plan per sequence."""
