# SPDX-License-Identifier: Apache-2.0
"""What is written into the KV cache where a generated token leaves attention out.

Three strategies, the engine's option ``kv_fill``. While a sequence keeps its plan no token
reads what is written here: it makes blocks complete, so that they may stay in the prefix
cache, and lets a sequence change its depth while it decodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from vllm_adaskip.engine.compat.kv_cache import KvCache, keep_keys_and_values
from vllm_adaskip.engine.step import Bools, Ints, Step, Tokens

if TYPE_CHECKING:
    from vllm.model_executor.layers.attention import Attention


class KvFill:
    """``none``: nothing is written; no request finds blocks with holes.

    Base of the other strategies. The model makes these calls in this order at every step in
    which something is skipped.
    """

    #: Whether `pass_by` is to be called.
    projects: ClassVar[bool] = False

    def __init__(self, attention: Sequence[Attention], cache: KvCache) -> None:
        self.cache = cache

    def begin(self, step: Step, *, may_change: bool) -> None:
        """Start a step, of which a gate may clear more while it runs."""

    def pass_by(self, layer: int, tokens: Tokens, key: Tensor, value: Tensor) -> None:
        """Take the K/V that a layer's own projection makes of tokens that leave it out."""

    def leave(self, layer: int, tokens: Ints, left_out: Bools) -> None:
        """Fill K/V of tokens in layers above ``layer`` that they leave out from here on.

        At once, because later tokens of the same sequence may be in the step and run them.

        Args:
            layer: that ran last.
            tokens: ``[leaving]`` positions in the step, which has been told.
            left_out: ``[leaving, num_layers]`` attention they leave out, by a gate.

        """

    def finish(self) -> None:
        """End the step; all layers have run."""

    def abandon(self) -> None:
        """End a step that was only a rehearsal; nothing is written."""


class ProjectFill(KvFill):
    """``project``: the skipped layer's own norm, K/V projection and rotary embedding.

    Applied to the hidden state that passes by (CALM, arXiv 2207.07061; FlexiDepth, arXiv
    2503.23798). Costs a small matrix product, reads those weights.
    """

    projects = True

    def pass_by(self, layer: int, tokens: Tokens, key: Tensor, value: Tensor) -> None:
        """Write at once."""
        slots = self.cache.slots(layer)
        self.cache.write(layer, key, value, slots[tokens.on(slots.device)])


@dataclass(frozen=True)
class Copies:
    """Which K/V rows go where.

    Attributes:
        sources: layers whose K/V are copied.
        rows: int64 ``[copies]``, places among the generated tokens that run the first source's
            attention, then the second's, and so on.
        layers: int64 ``[copies]``, the layer written to.
        tokens: int64 ``[copies]``, position in the step.

    All on the device of the cache, so that a step that stays copies nothing from the host.
    """

    sources: tuple[int, ...]
    rows: Tensor
    layers: Tensor
    tokens: Tensor

    @classmethod
    def of(
        cls, step: Step, tokens: Ints, wanted: Bools, ran: Bools, device: torch.device
    ) -> Copies:
        """Return the copies for tokens.

        Args:
            step: whose tokens they are.
            tokens: ``[tokens]`` positions.
            wanted: ``[tokens, num_layers]`` where K/V are to be written.
            ran: ``[tokens, num_layers]`` where there are any; a token without is left out.
            device: of the cache.

        """
        wanted = wanted & ran.any(axis=1, keepdims=True)
        own = np.where(ran, np.arange(ran.shape[1]), -1)
        below: Ints = np.maximum.accumulate(own, axis=1)
        nearest = np.where(below < 0, ran.argmax(axis=1)[:, None], below)
        at, layers = wanted.nonzero()
        source = nearest[at, layers]
        sources = np.unique(source)
        kept = [_generated(step, layer).positions for layer in sources.tolist()]
        rows, begin = np.empty_like(at), 0
        for layer, positions in zip(sources.tolist(), kept, strict=True):
            own = source == layer
            rows[own] = begin + np.searchsorted(positions, tokens[at[own]])
            begin += len(positions)
        found = (torch.from_numpy(each).to(device) for each in (rows, layers, tokens[at]))
        return cls((*sources.tolist(),), *found)


class CopyFill(KvFill):
    """``copy``: the K/V of the nearest attention below that the token did run.

    Of the nearest above where it ran none below. (Unified Layer Skipping, arXiv 2404.06954;
    DREX, arXiv 2512.15705.) No matrix product; one gather and one write for all layers. A token
    that leaves in the middle of a step is given the nearest of those that have run by then.
    """

    def __init__(self, attention: Sequence[Attention], cache: KvCache) -> None:
        super().__init__(attention, cache)
        self._step: Step | None = None
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        #: What was planned for each step that lives.
        self._planned: WeakKeyDictionary[Step, Copies] = WeakKeyDictionary()
        keep_keys_and_values(attention, self._keep)

    def begin(self, step: Step, *, may_change: bool) -> None:
        """Keep K/V from now on, of the layers whose K/V other layers may be given."""
        self._step = step
        self._written: Bools | None = None
        self._sources = None if may_change else self._copies().sources

    def _keep(self, layer: int, key: Tensor, value: Tensor) -> None:
        if (step := self._step) is None or not (self._sources is None or layer in self._sources):
            return
        if step.num_generated < step.num_tokens:
            rows = _generated(step, layer).places(step.part(2 * layer)).on(key.device)
            key, value = key[rows], value[rows]
        self._kept[layer] = key, value

    def leave(self, layer: int, tokens: Ints, left_out: Bools) -> None:
        """Copy what has been kept by now."""
        step = self._step
        assert step is not None
        if self._written is None:
            self._written = np.zeros((step.num_tokens, left_out.shape[1]), dtype=np.bool_)
        left_out = left_out & ~self._written[tokens]  # a gate may say the same again
        ran = step.runs[step.span_of(tokens), 0::2] & (np.arange(left_out.shape[1]) <= layer)
        self._write(Copies.of(step, tokens, left_out, ran, self.cache.device))
        self._written[tokens] |= left_out & ran.any(axis=1, keepdims=True)

    def finish(self) -> None:
        """Write all copies that are planned, at once."""
        if self._step is not None:
            self._write(self._copies())
        self.abandon()

    def abandon(self) -> None:
        """Forget the K/V that were kept."""
        self._step = None
        self._kept.clear()

    def _copies(self) -> Copies:
        """Return what is planned and not written yet; the same while the step stays."""
        step = self._step
        assert step is not None
        copies = self._planned.get(step)
        if copies is None or self._written is not None:
            tokens = step.tokens(step.generated).positions
            ran = step.runs[step.span_of(tokens), 0::2]
            wanted = ~ran if self._written is None else ~(ran | self._written[tokens])
            copies = Copies.of(step, tokens, wanted, ran, self.cache.device)
            self._planned[step] = copies
        return copies

    def _write(self, copies: Copies) -> None:
        if not copies.sources:
            return
        kept = zip(*(self._kept[layer] for layer in copies.sources), strict=True)
        key, value = (torch.cat(each).index_select(0, copies.rows) for each in kept)
        slots = self.cache.slots_in(copies.layers, copies.tokens)
        self.cache.write_many(copies.layers, key, value, slots)


def _generated(step: Step, layer: int) -> Tokens:
    """Return the generated tokens that run a layer's attention."""
    return step.tokens(step.generated & step.runs[:, 2 * layer])


#: Every strategy by the name that users write.
KV_FILLS: dict[str, type[KvFill]] = {"copy": CopyFill, "project": ProjectFill, "none": KvFill}
