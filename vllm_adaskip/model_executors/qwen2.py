# SPDX-License-Identifier: Apache-2.0
"""Qwen 2 and 2.5: biases on q, k and v, which are vLLM's business."""

from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM

from vllm_adaskip.model_executors.llama_layers import LlamaLayers


class AdaSkipQwen2ForCausalLM(LlamaLayers, Qwen2ForCausalLM):
    """vLLM's Qwen 2 with a skip plan per sequence."""
