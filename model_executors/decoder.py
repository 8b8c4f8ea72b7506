# SPDX-License-Identifier: Apache-2.0
"""The loop that all families share: run each sub-layer for the tokens that need it.

When nothing is skipped the family's own forward runs, compiled or not, exactly as in
stock vLLM. When something is, the loop below calls the same layer modules one by one.
vLLM's layers carry the residual stream as a pair ``(hidden, residual)`` whose sum it is,
the sum being fused into the next norm: leaving a sub-layer out means passing on both.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vllm_adaskip.classifiers.hub import located
from vllm_adaskip.classifiers.lora import Lora
from vllm_adaskip.engine import compat
from vllm_adaskip.engine.compat.head import Head
from vllm_adaskip.engine.compat.kernels import with_kernels
from vllm_adaskip.engine.runtime import SkipRuntime
from vllm_adaskip.engine.scaling import Scaling
from vllm_adaskip.engine.step_plan import Check, Passing, Segment, StepPlan

if TYPE_CHECKING:
    from vllm.config import VllmConfig

Stream = tuple[Tensor, Tensor | None]


class SkippingDecoder(nn.Module):
    """Mixin before a vLLM ``...ForCausalLM`` class; a family adds the methods marked abstract."""

    model: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        compat.enable_amx()
        #: What steps run in which something is skipped or observed; not registered once more.
        *layers, norm = with_kernels([*self.model.layers, self.model.norm])
        self._layers, self._norm = tuple(layers), (norm,)
        attention = map(self.attention_of, self.model.layers)
        self.adaskip = SkipRuntime(vllm_config, attention, Head(self, norm))

    @staticmethod
    def get_model_state_cls() -> type[Any]:
        """Give Model Runner V2 the feeder of our table."""
        from vllm_adaskip.engine.v2_feeder import AdaSkipModelState

        return AdaSkipModelState

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        """Load a checkpoint, with the profile's LoRA adapter merged into it if it has one."""
        if (profile := self.adaskip.profile) and (lora := Lora.of(located(profile))):
            weights = lora.merged(weights)
        return super().load_weights(weights)  # type: ignore[misc]

    @abstractmethod
    def attention_of(self, layer: Any) -> Any:
        """Give the layer's vLLM `Attention` module."""

    @abstractmethod
    def run_attention(self, layer: Any, positions: Tensor, stream: Stream) -> Stream:
        """Run a layer's norm and attention; ``[tokens]`` positions, ``[tokens, hidden]`` pair."""

    @abstractmethod
    def run_mlp(self, layer: Any, stream: Stream) -> Stream:
        """Run a layer's norm and MLP."""

    @abstractmethod
    def project_kv(self, layer: Any, positions: Tensor, stream: Stream) -> tuple[Tensor, Tensor]:
        """Give a layer's K and V ``[tokens, kv_heads * head_size]``, as its attention would."""

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Any:
        """Give hidden states ``[tokens, hidden]`` after the final norm."""
        step = self.adaskip.begin_step()
        if step is None:
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)
        if inputs_embeds is None:
            inputs_embeds = self.model.embed_input_ids(input_ids)
        return self._run_step(step, positions, inputs_embeds)

    def _run_step(self, step: StepPlan, positions: Tensor, embeddings: Tensor) -> Tensor:
        stream: Stream = (embeddings, None)
        guarded = self.adaskip.gate.guarded
        pieces = deque(step.pieces)
        while pieces:
            piece = pieces.popleft()
            if isinstance(piece, Check):
                rest = self.adaskip.exits.after(piece.layer, partial(_pair, stream))
                if rest is not None:
                    pieces = deque(rest.pieces)
            elif isinstance(piece, Passing):
                self._pass_by(piece, positions, stream)
            elif isinstance(piece, Scaling):
                _scale(stream, piece)
            elif piece.sub_layers[0] in guarded:
                stream = self._run_guarded(piece, positions, stream)
            else:
                stream = self._run_segment(piece, positions, stream)
        self.adaskip.end_step()
        hidden: Tensor = self._norm[0](*stream)[0]
        return hidden

    def _run_guarded(self, guarded: Segment, positions: Tensor, stream: Stream) -> Stream:
        """Run a sub-layer for the tokens that its gate lets through, and show the gate."""
        segment = self.adaskip.gate.narrowed(guarded)
        if segment is None:
            return stream
        stream = self._run_segment(segment, positions, stream)
        update, before = stream
        assert before is not None
        self.adaskip.gate.observe(segment, before, update)
        return stream

    def _run_segment(self, segment: Segment, positions: Tensor, stream: Stream) -> Stream:
        """Run the segment's sub-layers for its tokens; other tokens' rows stay as they are."""
        if (subset := segment.subset) is None:
            return self._run_sub_layers(segment, positions, stream)
        with self.adaskip.using(segment):
            part = _gather(stream, subset.tokens)
            part = self._run_sub_layers(segment, positions[subset.tokens], part)
        return _scatter(stream, subset.tokens, part)

    def _pass_by(self, passing: Passing, positions: Tensor, stream: Stream) -> None:
        layer, tokens = self._layers[passing.layer], passing.tokens
        hidden, residual = _gather(stream, tokens)
        if residual is not None and isinstance(tokens, slice):
            hidden, residual = hidden.clone(), residual.clone()  # vLLM's norm works in place
        key, value = self.project_kv(layer, positions[tokens], (hidden, residual))
        self.adaskip.kv_fill.write(passing, key, value)

    def _run_sub_layers(self, segment: Segment, positions: Tensor, stream: Stream) -> Stream:
        if self.adaskip.observer.values is not None:
            return self._run_observed(segment, positions, stream)
        for index, part in segment.parts:
            layer = self._layers[index]
            if part == "layer":
                stream = layer(positions, *stream)
            elif part == "attention":
                stream = self.run_attention(layer, positions, stream)
            else:
                stream = self.run_mlp(layer, stream)
        return stream

    def _run_observed(self, segment: Segment, positions: Tensor, stream: Stream) -> Stream:
        """Run one sub-layer after the other, and show the method what each changed."""
        tokens = None if segment.subset is None else segment.subset.tokens
        for sub_layer in segment.sub_layers:
            layer = self._layers[sub_layer // 2]
            if sub_layer % 2 == 0:
                stream = self.run_attention(layer, positions, stream)
            else:
                stream = self.run_mlp(layer, stream)
            update, before = stream
            assert before is not None
            self.adaskip.observer.observe(sub_layer, before, update, tokens)
        return stream


def add_and_norm(norm: nn.Module, stream: Stream) -> tuple[Tensor, Tensor]:
    """Give ``(normed, residual)``, as a vLLM layer makes them; the first has no residual yet."""
    hidden, residual = stream
    if residual is None:
        return norm(hidden), hidden
    normed, residual = norm(hidden, residual)
    return normed, residual


def _scale(stream: Stream, scaling: Scaling) -> None:
    """Multiply some rows of both halves of the stream, in place as vLLM's norms are."""
    for half in stream:
        if half is not None:
            half[scaling.tokens] *= scaling.factors.to(half.device)


def _pair(stream: Stream, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Give ``(before, update)`` of some tokens, copied, once a sub-layer has run."""
    update, before = _gather(stream, tokens)
    assert before is not None
    return before, update


def _gather(stream: Stream, tokens: slice | Tensor) -> Stream:
    hidden, residual = stream
    return hidden[tokens], None if residual is None else residual[tokens]


def _scatter(stream: Stream, tokens: slice | Tensor, part: Stream) -> Stream:
    """Put the part's rows back; before any sub-layer has run the others' pair is (0, stream)."""
    hidden, residual = stream
    if residual is None:
        hidden, residual = torch.zeros_like(hidden), hidden.clone()
    part_hidden, part_residual = part
    assert part_residual is not None  # a sub-layer has run
    hidden[tokens], residual[tokens] = part_hidden, part_residual
    return hidden, residual
