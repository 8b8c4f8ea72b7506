# SPDX-License-Identifier: Apache-2.0
"""While a forward runs: the engine's state, the step's metadata, and parts of its batch."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_adaskip.engine.compat.kv_cache import WHOLE_STEP, first_unwindowed
from vllm_adaskip.engine.step import NOBODY, Ints, Part

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.model_executor.layers.attention import Attention

_STATE_KEY = "adaskip.state"


def share(vllm_config: VllmConfig, state: object) -> None:
    """Put the feeder's state where the model of the same engine finds it.

    The runner's logits processor and the model meet at nothing but the engine's own
    config object; its ``static_forward_context`` holds "layer objects that need to be
    accessed outside model code" and dies with the engine, so two engines in one process
    never share one.

    Since 0.26. Remove when the runner hands its model per-request state (V2 does).
    """
    vllm_config.compilation_config.static_forward_context[_STATE_KEY] = state


def shared(vllm_config: VllmConfig) -> object | None:
    """Return what `share` put there; None: nothing. Since and remove when: see there."""
    state: object | None = vllm_config.compilation_config.static_forward_context.get(_STATE_KEY)
    return state


def step_lengths(metadata: Any) -> tuple[Ints, Ints]:
    """Return ``query_start_loc`` ``[rows + 1]`` and ``seq_lens`` ``[rows]`` of a step on the host.

    On the CPU backend these are views, no copies and no synchronisation. Since 0.26.
    Remove when the runner hands its model the step's layout (V2 does).
    """
    starts: Ints = metadata.query_start_loc.numpy()
    lengths: Ints = metadata.seq_lens.numpy()
    return starts.astype(np.int64), lengths.astype(np.int64)


def warm_up(vllm_config: VllmConfig) -> AbstractContextManager[Any]:
    """Enter a forward without sequences, in which vLLM's attention writes and reads nothing.

    Since 0.26 (`set_forward_context` without metadata, as in `profile_run`). Remove when a
    model is asked to warm up.
    """
    from vllm.forward_context import set_forward_context

    entered: AbstractContextManager[Any] = set_forward_context(None, vllm_config)
    return entered


def of_rank_0(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return what the first tensor-parallel rank has; all ranks call this at the same time.

    Since 0.26 (`get_tp_group`, `GroupCoordinator.cpu_group`). Remove when vLLM documents
    a group for plugins.
    """
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    if group.world_size == 1:
        return values
    sent = torch.from_numpy(values.copy())
    torch.distributed.broadcast(sent, src=group.ranks[0], group=group.cpu_group)
    found: NDArray[np.float64] = sent.numpy()
    return found


class SubBatches:
    """A forward context in which each layer's attention sees its part of the step's tokens.

    Attention metadata of the parts come from the backend's own builder, made once per part and
    step. A layer's attention looks up metadata and slots under its own name, and runs once a step,
    so one context serves all parts of a step. Since 0.26 (`CommonAttentionMetadata`,
    `override_forward_context`, names of metadata fields). Remove when vLLM runs layers on
    parts of a batch itself.
    """

    def __init__(self, vllm_config: VllmConfig, layers: Iterable[Attention]) -> None:
        self._vllm_config = vllm_config
        self._layers = list(layers)
        self._names = [layer.layer_name for layer in self._layers]
        self._first = self._names[first_unwindowed(self._layers)]
        self._groups: list[_Group] = []
        self._context: ForwardContext | None = None

    def step_metadata(self) -> Any | None:
        """Return the attention metadata of the step that runs now; None in a warm-up.

        Of a layer that sees whole sequences, if there is one, whose block table has all blocks.
        """
        from vllm.forward_context import get_forward_context

        metadata = get_forward_context().attn_metadata
        return metadata[self._first] if isinstance(metadata, dict) else None

    def during(self, parts: Sequence[Part | None]) -> AbstractContextManager[Any]:
        """Make a context the current one, for this forward, in which each layer sees its part."""
        from vllm.forward_context import get_forward_context, override_forward_context

        step = get_forward_context()
        assert isinstance(step.attn_metadata, dict) and isinstance(step.slot_mapping, dict)
        if not self._groups:
            self._groups = self._make_groups(step.attn_metadata)
        for group in self._groups:
            group.whole = step.attn_metadata[group.name], step.slot_mapping[group.name]
        self._context = dataclasses.replace(
            step,
            attn_metadata=dict(step.attn_metadata),
            slot_mapping={**step.slot_mapping, WHOLE_STEP: step.slot_mapping},
        )
        self.arrange(parts)
        entered: AbstractContextManager[Any] = override_forward_context(self._context)
        return entered

    def arrange(self, parts: Sequence[Part | None], start: int = 0) -> None:
        """Have the attention of layers see parts, of which they make metadata.

        Args:
            parts: of each layer from ``start`` on; None: all tokens.
            start: the first layer that is still to run.

        """
        assert self._context is not None
        for group in self._groups:
            layers = group.layers[bisect_left(group.layers, start) :]
            seen = group.metadata([parts[layer - start] for layer in layers])
            for layer in layers:
                name, part = self._names[layer], parts[layer - start]
                self._context.attn_metadata[name], self._context.slot_mapping[name] = seen[part]

    def _make_groups(self, metadata: dict[str, Any]) -> list[_Group]:
        return [
            _Group(layers, self._names[layers[0]], builder)
            for layers, builder in groups_of(self._vllm_config, self._layers, metadata)
        ]


def groups_of(
    vllm_config: VllmConfig, layers: Sequence[Attention], metadata: dict[str, Any]
) -> list[tuple[list[int], Any]]:
    """Put layers that share a step's metadata together, each with what builds its metadata.

    Call it once the KV cache is laid out. Since and remove when: see `SubBatches`.
    """
    found: dict[int, list[int]] = {}
    for layer, one in enumerate(layers):
        found.setdefault(id(metadata[one.layer_name]), []).append(layer)
    return [
        (own, _builder(vllm_config, [layers[at] for at in own], metadata)) for own in found.values()
    ]


def _builder(vllm_config: VllmConfig, layers: Sequence[Attention], metadata: dict[str, Any]) -> Any:
    first = layers[0]
    return first.attn_backend.get_builder_cls()(
        first.get_kv_cache_spec(vllm_config),
        [layer.layer_name for layer in layers],
        vllm_config,
        metadata[first.layer_name].query_start_loc.device,
    )


class _Group:
    """Layers that share metadata and slots: all, or those with a window of one size, or without.

    Attributes:
        layers: in order.
        name: of the first.
        whole: metadata and slots of the whole step that runs now.

    """

    def __init__(self, layers: list[int], name: str, builder: Any) -> None:
        self.layers, self.name, self._builder = layers, name, builder
        self.whole: tuple[Any, Tensor]
        self._joined: _Joined | None = None

    def metadata(self, parts: Sequence[Part | None]) -> dict[Part | None, tuple[Any, Tensor]]:
        """Make metadata and slots of parts: one gather for all, then views."""
        from vllm.v1.attention.backend import CommonAttentionMetadata

        found: dict[Part | None, tuple[Any, Tensor]] = {None: self.whole, NOBODY: self.whole}
        own = tuple(dict.fromkeys(part for part in parts if part not in (None, NOBODY)))
        if not own:
            return found
        whole, whole_slots = self.whole
        device = whole.seq_lens.device
        if self._joined is None or self._joined.parts != own:
            self._joined = _Joined(own, device)
        joined = self._joined
        seq_lens: Tensor = whole.seq_lens.index_select(0, joined.rows)
        if joined.behind is not None:
            seq_lens -= joined.behind
        tables: Tensor = whole.block_table.index_select(0, joined.rows)
        for part, lengths, table, slots in zip(
            own,
            torch.split(seq_lens, joined.entries),
            torch.split(tables, joined.entries),
            torch.split(whole_slots.index_select(0, joined.tokens), joined.counts),
            strict=True,
        ):
            metadata = self._builder.build(
                0,
                CommonAttentionMetadata(
                    query_start_loc=part.starts.to(device),
                    query_start_loc_cpu=part.starts,
                    seq_lens=lengths,
                    num_reqs=len(part.rows),
                    num_actual_tokens=part.count,
                    max_query_len=part.longest,
                    max_seq_len=whole.max_seq_len,
                    block_table_tensor=table,
                    slot_mapping=slots,
                    causal=True,
                ),
            )
            found[part] = metadata, slots
        return found


class _Joined:
    """Parts of one step, laid end to end, with their indices on the device.

    Kept while the parts stay, which in steady decoding they do.
    """

    def __init__(self, parts: tuple[Part, ...], device: torch.device) -> None:
        self.parts = parts
        self.entries = [len(part.rows) for part in parts]
        self.counts = [part.count for part in parts]
        rows, tokens, behind = (
            np.concatenate(each)
            for each in (
                [part.rows for part in parts],
                [part.positions for part in parts],
                [part.behind for part in parts],
            )
        )
        self.rows = torch.from_numpy(rows).to(device)
        self.tokens = torch.from_numpy(tokens).to(device)
        self.behind = torch.from_numpy(behind.astype(np.int32)).to(device) if behind.any() else None
