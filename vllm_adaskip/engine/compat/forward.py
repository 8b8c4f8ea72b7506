# SPDX-License-Identifier: Apache-2.0
"""While a forward runs: the engine's table, the step's metadata, and parts of its batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vllm_adaskip.engine.compat.kv_cache import WHOLE_STEP
from vllm_adaskip.engine.joined_subsets import JoinedSubsets
from vllm_adaskip.engine.layout import IntArray, Subset, Tokens
from vllm_adaskip.engine.naming import planner_of
from vllm_adaskip.engine.state import SkipState
from vllm_adaskip.engine.step_plan import Segment, StepPlan

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.model_executor.layers.attention import Attention

_STATE_KEY = "adaskip.state"


def share_state(vllm_config: VllmConfig, state: SkipState) -> None:
    """Put the feeder's state where the model of the same engine finds it.

    The runner's logits processor and the model meet at nothing but the engine's own
    config object; its ``static_forward_context`` holds "layer objects that need to be
    accessed outside model code" and dies with the engine, so two engines in one process
    never share one.

    Since 0.26. Remove when the runner hands its model per-request state (V2 does).
    """
    vllm_config.compilation_config.static_forward_context[_STATE_KEY] = state


def shared_state(vllm_config: VllmConfig) -> SkipState:
    """Give the state of this engine.

    The V1 runner makes its feeder before its model. Under V2 the model comes first, and brings
    the feeder along, so whoever asks first makes the state.

    Raises:
        RuntimeError: nobody feeds plans to this engine, which would be silently dense.

    Since and remove when: see `share_state`.
    """
    state = vllm_config.compilation_config.static_forward_context.get(_STATE_KEY)
    if state is None and vllm_config.use_v2_model_runner:
        capacity = vllm_config.scheduler_config.max_num_seqs
        state = SkipState(planner_of(vllm_config), capacity, is_told_lengths=True)
        share_state(vllm_config, state)
    if not isinstance(state, SkipState):
        raise RuntimeError(
            "vllm-adaskip: no feeder runs in this engine, so it would ignore every plan; "
            "start it with --plugin adaskip, or with vllm_adaskip.engine_args()"
        )
    return state


def step_lengths(metadata: Any) -> tuple[IntArray, IntArray]:
    """Give ``query_start_loc`` ``[rows + 1]`` and ``seq_lens`` ``[rows]`` of a step on the host.

    On the CPU backend these are views, no copies and no synchronisation. Since 0.26.
    Remove when the runner hands its model the step's layout (V2 does).
    """
    starts: IntArray = metadata.query_start_loc.numpy()
    lengths: IntArray = metadata.seq_lens.numpy()
    return starts.astype(np.int64), lengths.astype(np.int64)


class SubBatches:
    """A forward context in which each layer's attention sees its part of the step's tokens.

    Attention metadata of the parts come from the backend's own builder, made once per subset and
    step. A layer's attention looks up metadata and slots under its own name, and runs once a step,
    so one context serves all parts of a step. Since 0.26 (`CommonAttentionMetadata`,
    `override_forward_context`, names of metadata fields). Remove when vLLM runs layers on
    subsets itself.
    """

    def __init__(self, vllm_config: VllmConfig, layers: Iterable[Attention]) -> None:
        self._vllm_config = vllm_config
        self._layers = list(layers)
        self._names = [layer.layer_name for layer in self._layers]
        self._builder: Any = None
        self._parts: dict[Subset | None, tuple[Any, Tensor]] = {}
        self._context: ForwardContext | None = None

    def step_metadata(self) -> Any | None:
        """Give the attention metadata of the step that runs now; None in a warm-up."""
        from vllm.forward_context import get_forward_context

        metadata = get_forward_context().attn_metadata
        return metadata[self._names[0]] if isinstance(metadata, dict) else None

    def during(self, plan: StepPlan) -> AbstractContextManager[Any]:
        """Make a context the current one, for this forward, that is arranged as planned."""
        from vllm.forward_context import get_forward_context, override_forward_context

        step = get_forward_context()
        first = self._names[0]
        self._parts = {None: (step.attn_metadata[first], step.slot_mapping[first])}
        if self._builder is None:
            self._builder = self._make_builder(step)
        self._context = dataclasses.replace(
            step,
            attn_metadata=dict(step.attn_metadata),
            slot_mapping={**step.slot_mapping, WHOLE_STEP: step.slot_mapping[first]},
        )
        self.arrange(plan)
        entered: AbstractContextManager[Any] = override_forward_context(self._context)
        return entered

    def arrange(self, plan: StepPlan) -> None:
        """Have the attention of every layer that is still to run see what a plan says."""
        if plan.joined is not None:
            self._make_parts(plan.joined)
        for piece in plan.pieces:
            if isinstance(piece, Segment) and piece.attention:
                self.show(piece.attention, None if piece.others else piece.subset)

    def show(self, layers: Iterable[int], subset: Tokens | None) -> None:
        """Have the attention of layers see a subset, of which there are metadata; None: all."""
        assert self._context is not None and (subset is None or isinstance(subset, Subset))
        metadata, slots = self._parts[subset]
        for layer in layers:
            self._context.attn_metadata[self._names[layer]] = metadata
            self._context.slot_mapping[self._names[layer]] = slots

    def _make_parts(self, joined: JoinedSubsets) -> None:
        from vllm.v1.attention.backend import CommonAttentionMetadata

        whole, whole_slots = self._parts[None]
        device = whole.seq_lens.device
        rows, tokens, dropped = joined.on(device)
        seq_lens: Tensor = whole.seq_lens.index_select(0, rows)
        if dropped is not None:
            seq_lens -= dropped
        tables: Tensor = whole.block_table.index_select(0, rows)
        parts = zip(
            joined.subsets,
            joined.num_rows,
            torch.split(seq_lens, joined.num_rows),
            torch.split(tables, joined.num_rows),
            torch.split(whole_slots.index_select(0, tokens), joined.num_tokens),
            strict=True,
        )
        for one, num_rows, lengths, table, slots in parts:
            metadata = self._builder.build(
                0,
                CommonAttentionMetadata(
                    query_start_loc=one.query_start_loc.to(device),
                    query_start_loc_cpu=one.query_start_loc,
                    seq_lens=lengths,
                    num_reqs=num_rows,
                    num_actual_tokens=one.num_tokens,
                    max_query_len=one.max_query_len,
                    max_seq_len=whole.max_seq_len,
                    block_table_tensor=table,
                    slot_mapping=slots,
                    causal=True,
                ),
            )
            self._parts[one] = metadata, slots

    def _make_builder(self, step: ForwardContext) -> Any:
        """Make the backend's builder, once the KV cache is laid out."""
        metadata = step.attn_metadata
        assert isinstance(metadata, dict)
        if len({id(metadata[name]) for name in self._names}) > 1:
            raise NotImplementedError(
                "vllm-adaskip: this model's attention layers are in several KV cache groups "
                "(sliding window?), which skipping does not support yet"
            )
        first = self._layers[0]
        return first.attn_backend.get_builder_cls()(
            first.get_kv_cache_spec(self._vllm_config),
            self._names,
            self._vllm_config,
            metadata[self._names[0]].query_start_loc.device,
        )
