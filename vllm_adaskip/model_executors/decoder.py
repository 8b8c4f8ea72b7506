# SPDX-License-Identifier: Apache-2.0
"""The loop that all families share: run each sub-layer for the tokens that need it.

When nothing is skipped the family's own forward runs, compiled or not, exactly as in
stock vLLM. When something is, the loop below runs the same modules, sub-layer by sub-layer.
It carries the residual stream as a pair ``(update, before)``: what the sub-layer that ran last
made of the stream, and the stream before it. Their sum is the stream; leaving a sub-layer out
means passing on both. Most of vLLM's layers carry it so, with the sum fused into the next norm.
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
from vllm_adaskip.engine.layout import Tokens
from vllm_adaskip.engine.runtime import SkipRuntime
from vllm_adaskip.engine.scaling import Scaling
from vllm_adaskip.engine.step_plan import Check, Passing, Segment, StepPlan
from vllm_adaskip.model_executors.stream import Stream, gather, pair, rows, scale, scatter

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class SkippingDecoder(nn.Module):
    """Mixin before a vLLM ``...ForCausalLM`` class; a family adds the methods marked abstract.

    A layer that they are given, and `stack`, come with kernels (`compat.kernels`).
    """

    model: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        compat.enable_amx()
        stack = self.stack_of(self.model)
        attention = map(self.attention_of, stack.layers)
        self.adaskip = SkipRuntime(vllm_config, attention, Head(self, self.finish))
        #: What steps run in which something is skipped or observed; not registered once more.
        self._stack = (with_kernels(stack),)
        self._layers = [*self.stack.layers]  # whose lookup takes longer than this list's

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

    @property
    def stack(self) -> Any:
        """The module with the list ``layers``, and what comes before and after them."""
        return self._stack[0]

    def stack_of(self, model: Any) -> Any:
        """Find that module in vLLM's ``model``, which most often is it."""
        return model

    def attention_of(self, layer: Any) -> Any:
        """Give the layer's vLLM `Attention` module."""
        return layer.self_attn.attn

    def embed(
        self, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None
    ) -> Tensor:
        """Give the stream ``[tokens, hidden]`` that the first layer sees; one input is not None."""
        if inputs_embeds is not None:
            return inputs_embeds
        embedded: Tensor = self.model.embed_input_ids(input_ids)
        return embedded

    @abstractmethod
    def run_attention(self, layer: Any, positions: Tensor, stream: Stream) -> Stream:
        """Run a layer's attention and the norm that is its own; ``[tokens]`` positions."""

    @abstractmethod
    def run_mlp(self, layer: Any, stream: Stream) -> Stream:
        """Run a layer's MLP and the norm that is its own."""

    @abstractmethod
    def project_kv(self, layer: Any, positions: Tensor, stream: Stream) -> tuple[Tensor, Tensor]:
        """Give a layer's K and V ``[tokens, kv_heads * head_size]``, as its attention would."""

    @abstractmethod
    def finish(self, stream: Stream) -> Tensor:
        """Give what the LM head takes, ``[tokens, width]``, of the stream after any layer."""

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Any:
        """Give what the LM head takes, ``[tokens, width]``."""
        step = self.adaskip.begin_step()
        if step is None:
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)
        return self._run_step(step, positions, self.embed(input_ids, positions, inputs_embeds))

    def _run_step(self, step: StepPlan, positions: Tensor, embedded: Tensor) -> Tensor:
        with self.adaskip.running(step):
            stream = self._run_pieces(step, positions, (embedded, None))
        self.adaskip.end_step()
        return self.finish(stream)

    def _run_pieces(self, step: StepPlan, positions: Tensor, stream: Stream) -> Stream:
        guarded = self.adaskip.gate.guarded
        pieces = deque(step.pieces)
        while pieces:
            piece = pieces.popleft()
            if isinstance(piece, Check):
                rest = self.adaskip.exits.after(piece.layer, partial(pair, stream))
                if rest is not None:
                    self.adaskip.go_on(rest)
                    pieces = deque(rest.pieces)
            elif isinstance(piece, Passing):
                self._pass_by(piece, positions, stream)
            elif isinstance(piece, Scaling):
                scale(stream, piece)
            elif piece.sub_layers[0] in guarded:
                stream = self._run_guarded(piece, positions, stream)
            else:
                stream = self._run_segment(piece, positions, stream)
        return stream

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
        if segment.others is not None:
            return self._run_all(segment, segment.others, positions, stream)
        tokens = subset.on(positions.device)
        part = gather(stream, tokens)
        if segment.attention:  # nothing else looks at them
            positions = rows(positions, tokens)
        part = self._run_sub_layers(segment, positions, part)
        return scatter(stream, tokens, part)

    def _run_all(
        self, segment: Segment, others: Tokens, positions: Tensor, stream: Stream
    ) -> Stream:
        """Run them for all tokens, and put back what the others had, as if they had not."""
        tokens = others.on(positions.device)
        update, before = gather(stream, tokens)
        if before is None:
            update, before = torch.zeros_like(update), update
        if isinstance(tokens, slice):  # a view, of what vLLM's norms change in place
            update, before = update.clone(), before.clone()
        stream = self._run_sub_layers(segment, positions, stream)
        return scatter(stream, tokens, (update, before))

    def _pass_by(self, passing: Passing, positions: Tensor, stream: Stream) -> None:
        layer, tokens = self._layers[passing.layer], passing.tokens
        update, before = gather(stream, tokens)
        if before is not None and isinstance(tokens, slice):
            update, before = update.clone(), before.clone()  # vLLM's norms work in place
        key, value = self.project_kv(layer, positions[tokens], (update, before))
        self.adaskip.kv_fill.write(passing, key, value)

    def _run_sub_layers(self, segment: Segment, positions: Tensor, stream: Stream) -> Stream:
        """Run one sub-layer after the other, and show the method what each changed."""
        is_observed = self.adaskip.observer.values is not None
        subset = segment.subset if segment.others is None else None
        tokens = None if subset is None else subset.tokens
        layers = self._layers
        for sub_layer in segment.sub_layers:
            index, is_mlp = divmod(sub_layer, 2)
            if is_mlp:
                stream = self.run_mlp(layers[index], stream)
            else:
                stream = self.run_attention(layers[index], positions, stream)
            if is_observed:
                update, before = stream
                assert before is not None
                self.adaskip.observer.observe(sub_layer, before, update, tokens)
        return stream
