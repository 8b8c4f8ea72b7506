# SPDX-License-Identifier: Apache-2.0
"""Mistral: vLLM's classes for it subclass those for Llama."""

from vllm.model_executor.models.mistral import MistralForCausalLM

from vllm_adaskip.model_executors.llama_layers import LlamaLayers


class AdaSkipMistralForCausalLM(LlamaLayers, MistralForCausalLM):
    """vLLM's Mistral with a skip plan per sequence."""
