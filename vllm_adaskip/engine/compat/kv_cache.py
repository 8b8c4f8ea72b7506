# SPDX-License-Identifier: Apache-2.0
"""The paged KV cache as the attention backend lays it out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from vllm.model_executor.layers.attention import Attention

#: In a forward context of ours, beside layers' names: slots of all tokens of the step, by layer.
WHOLE_STEP = "adaskip.step"


def first_unwindowed(layers: Sequence[Attention]) -> int:
    """Return the first layer whose attention has no sliding window; 0 if all have one."""
    return next((at for at, layer in enumerate(layers) if layer.sliding_window is None), 0)


class KvCache:
    """Writes K/V of tokens into chosen layers, by the backend's own cache-update op.

    That op takes one layer's cache. vLLM gives all layers views of one allocation, evenly
    spaced; where it does, and where no layer scales its K/V in its own way (fp8), one view
    over all layers lets one call write to many.

    Since 0.26 (`Attention.impl.do_kv_cache_update`, `Attention.kv_cache`, and the forward
    context's `slot_mapping`). Remove when vLLM writes K/V without attention itself.
    """

    def __init__(self, layers: Sequence[Attention]) -> None:
        self._layers = layers
        self._first = first_unwindowed(layers)
        self._is_one_group: bool | None = None
        self._joint: Tensor | None = None
        self._joint_slots: Tensor | None = None
        self._is_bound = False
        #: Of several layers that K/V were written into: each with the places of its own.
        self._grouped: Any = WeakTensorKeyDictionary()

    @property
    def device(self) -> torch.device:
        """Where the cache is."""
        device: torch.device = self._layers[0].kv_cache.device
        return device

    @property
    def geometry(self) -> tuple[int, int]:
        """``(blocks, slots per block)`` of one layer's cache ``[blocks, heads, slots, size]``."""
        blocks, _, slots, _ = self._layers[self._first].kv_cache.shape
        return blocks, slots

    @property
    def forgets(self) -> bool:
        """Whether every layer has a sliding window, behind which a sequence's blocks are freed."""
        return all(layer.sliding_window is not None for layer in self._layers)

    def slots(self, layer: int | None = None) -> Tensor:
        """Return the slot of each token of the step that runs now, ``[tokens]`` int64.

        None: in a layer that keeps whole sequences, if there is one.
        """
        from vllm.forward_context import get_forward_context

        mapping: Any = get_forward_context().slot_mapping
        name = self._layers[self._first if layer is None else layer].layer_name
        slots: Tensor = mapping.get(WHOLE_STEP, mapping)[name]
        return slots

    def slots_in(self, layers: Tensor, tokens: Tensor) -> Tensor:
        """Return slots of ``[n]`` tokens of the step, each in its own of ``[n]`` layers."""
        if self._is_one_group is None:
            ours = [self.slots(layer) for layer in range(len(self._layers))]
            self._is_one_group = len({each.data_ptr() for each in ours}) == 1
        if self._is_one_group:
            return self.slots()[tokens]
        return torch.stack([self.slots(layer) for layer in range(len(self._layers))])[
            layers, tokens
        ]

    def write(self, layer: int, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Write K/V ``[tokens, kv_heads, head_size]`` (or flat) into one layer."""
        self._update(layer, self._layers[layer].kv_cache, key, value, slots)

    def write_many(self, layers: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Write K/V into several layers; ``layers`` ``[tokens]`` int64 names each token's."""
        if not self._is_bound:
            self._join()
        if self._joint is not None and self._joint_slots is not None:
            self._update(0, self._joint, key, value, slots + self._joint_slots[layers])
            return
        for layer, places in self._places(layers):
            self.write(layer, key[places], value[places], slots[places])

    def _places(self, layers: Tensor) -> list[tuple[int, Tensor]]:
        """Return each layer among ``[tokens]`` layers, with the places of its tokens."""
        found: list[tuple[int, Tensor]] | None = self._grouped.get(layers)
        if found is None:
            own = set(layers.tolist())
            found = [(layer, (layers == layer).nonzero()[:, 0]) for layer in sorted(own)]
            self._grouped[layers] = found
        return found

    def _update(self, layer: int, cache: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
        attention: Any = self._layers[layer]
        shape = -1, attention.num_kv_heads, attention.head_size
        attention.impl.do_kv_cache_update(
            attention, key.reshape(shape), value.reshape(shape), cache, slots
        )

    def _join(self) -> None:
        """Find the view over all layers, once the cache is bound; None if there is none.

        None on accelerators, where graphs pad steps with slots below 0, which no shift may move.
        """
        self._is_bound = True
        caches = [layer.kv_cache for layer in self._layers]
        first = caches[0]
        offsets = torch.tensor([cache.storage_offset() for cache in caches])
        blocks, slots = self.geometry
        step = first.stride(0)
        alike = all(
            cache.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            and cache.stride() == first.stride()
            for cache in caches
        )
        scales = {(layer._k_scale_float, layer._v_scale_float) for layer in self._layers}
        if (
            first.device.type != "cpu"
            or not alike
            or len(scales) > 1
            or (offsets % step != offsets[0] % step).any()
        ):
            return
        shift = (offsets - offsets.min()) // step  # in blocks
        size = int(shift.max()) + blocks
        self._joint = first.as_strided((size, *first.shape[1:]), first.stride(), int(offsets.min()))
        self._joint_slots = (shift * slots).to(first.device)


def keep_keys_and_values(
    layers: Sequence[Attention], keep: Callable[[int, Tensor, Tensor], None]
) -> None:
    """Call ``keep(layer, key, value)`` whenever a layer's attention is about to run.

    A forward pre-hook of `torch.nn.Module`. Since 0.26 (`Attention.forward` takes query, key
    and value by position). Remove when vLLM hands out the K/V of a step.
    """

    def hook(layer: int) -> Callable[[Any, Any], None]:
        return lambda module, args: keep(layer, args[1], args[2])

    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(hook(index))
