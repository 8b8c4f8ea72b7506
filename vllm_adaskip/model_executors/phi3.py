# SPDX-License-Identifier: Apache-2.0
"""Phi-3 and Phi-4: as Llama, whose projections their checkpoints bring fused."""

from vllm.model_executor.models.phi3 import Phi3ForCausalLM

from vllm_adaskip.model_executors.llama_layers import LlamaLayers


class AdaSkipPhi3ForCausalLM(LlamaLayers, Phi3ForCausalLM):
    """vLLM's Phi-3 with a skip plan per sequence."""
