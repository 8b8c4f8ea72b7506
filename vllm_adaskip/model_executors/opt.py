# SPDX-License-Identifier: Apache-2.0
"""OPT: learned positions, layer norms before or after, embeddings of another width.

Most checkpoints norm before a sub-layer, ``x + f(norm(x))``. OPT 350M norms after it,
``norm(x + f(x))``: what such a sub-layer changes is then ``norm(x + f(x)) - x``, and a token
that leaves it out keeps ``x``, without the norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.models.opt import OPTForCausalLM

from vllm_adaskip.classifiers import Stream
from vllm_adaskip.engine.compat.projection import project
from vllm_adaskip.engine.loop import SkippingDecoder


class AdaSkipOPTForCausalLM(SkippingDecoder, OPTForCausalLM):
    """vLLM's OPT with a skip plan per sequence."""

    def stack_of(self, model: Any) -> Any:
        """Return the decoder; the model around it holds nothing else."""
        return model.decoder

    def embed(
        self, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None
    ) -> Tensor:
        """Widen the embeddings where they are narrower than the layers, and add positions."""
        embedded = super().embed(input_ids, positions, inputs_embeds)
        if self.stack.project_in is not None:
            embedded, _ = self.stack.project_in(embedded)
        learned: Tensor = self.stack.embed_positions(positions)
        return embedded + learned

    def run_attention(self, layer: Any, positions: Tensor, stream: Stream) -> Stream:
        """Run self-attention and its norm; positions are in the stream already."""
        return _run(layer, layer.self_attn_layer_norm, layer.self_attn, stream)

    def run_mlp(self, layer: Any, stream: Stream) -> Stream:
        """Run the MLP, whose parts stand in the layer itself, and its norm."""

        def mlp(hidden: Tensor) -> Tensor:
            update: Tensor = layer.fc2(layer.activation_fn(layer.fc1(hidden)[0]))[0]
            return update

        return _run(layer, layer.final_layer_norm, mlp, stream)

    def project_kv(self, layer: Any, positions: Tensor, stream: Stream) -> tuple[Tensor, Tensor]:
        """Run the K/V projection, after the norm if that comes before."""
        hidden = _whole(stream)
        if layer.do_layer_norm_before:
            hidden = layer.self_attn_layer_norm(hidden)
        _, key, value = project(layer.self_attn.qkv_proj, hidden)
        return key, value

    def finish(self, stream: Stream) -> Tensor:
        """Run the final norm, which post-norm models lack, and narrow to the head's width."""
        hidden = _whole(stream)
        if self.stack.final_layer_norm is not None:
            hidden = self.stack.final_layer_norm(hidden)
        if self.stack.project_out is not None:
            hidden, _ = self.stack.project_out(hidden)
        return hidden


def _run(
    layer: Any, norm: nn.Module, sub_layer: Callable[[Tensor], Tensor], stream: Stream
) -> Stream:
    before = _whole(stream)
    if layer.do_layer_norm_before:
        return Stream(sub_layer(norm(before)), before)
    return Stream(norm(before + sub_layer(before)) - before, before)


def _whole(stream: Stream) -> Tensor:
    update, before = stream
    return update if before is None else update + before
