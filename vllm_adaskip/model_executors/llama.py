# SPDX-License-Identifier: Apache-2.0
"""Llama: `LlamaForCausalLM` and the checkpoints that share its class."""

from vllm.model_executor.models.llama import LlamaForCausalLM

from vllm_adaskip.model_executors.llama_layers import LlamaLayers


class AdaSkipLlamaForCausalLM(LlamaLayers, LlamaForCausalLM):
    """vLLM's Llama with a skip plan per sequence."""
