# SPDX-License-Identifier: Apache-2.0
"""What is written into the KV cache where a generated token leaves attention out.

Three strategies, the engine's option ``kv_fill``. While a sequence keeps its plan nobody
reads what is written here: it makes blocks complete, so that they may stay in the prefix
cache, and lets a sequence change its depth while it decodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from vllm_adaskip.engine.compat.kv_cache import KvCache, keep_keys_and_values
from vllm_adaskip.engine.kv_copies import Copies, place_of_tokens
from vllm_adaskip.engine.layout import BoolArray, IntArray, Layout
from vllm_adaskip.engine.step_plan import Check, Passing, StepPlan

if TYPE_CHECKING:
    from vllm.model_executor.layers.attention import Attention


class KvFill:
    """``none``: nothing is written; blocks with holes are then found by nobody.

    Base of the other strategies. The model makes these calls in this order at every step in
    which something is skipped.
    """

    #: Whether the step plan must say where tokens pass by an attention sub-layer.
    wants_passing: ClassVar[bool] = False

    def __init__(self, attention: Sequence[Attention], cache: KvCache) -> None:
        self.cache = cache

    def begin(self, plan: StepPlan, skips: BoolArray, layout: Layout) -> None:
        """Start a step; the same ``plan`` object comes again while nothing changes."""

    def write(self, passing: Passing, key: Tensor, value: Tensor) -> None:
        """Take the passed layer's own K/V of its tokens, where ``wants_passing``."""

    def leave(
        self, layer: int, tokens: IntArray, rest: StepPlan, skips: BoolArray, layout: Layout
    ) -> None:
        """Give tokens K/V in all layers above the one after which they leave the step.

        At once, because later tokens of the same sequence may be in the step and go deeper.

        Args:
            layer: it has run for them, and so have all below.
            tokens: ``[tokens]``, index in the step.
            rest: what runs now instead of what is left of the plan, with its own ``skips`` and
                ``layout``; with ``wants_passing`` it says where these tokens pass by.
            skips: see ``rest``.
            layout: see ``rest``.

        """

    def finish(self) -> None:
        """End the step; all layers have run."""


class ProjectFill(KvFill):
    """``project``: the skipped layer's own norm, K/V projection and rotary embedding.

    Applied to the hidden state that passes by (CALM, arXiv 2207.07061; FlexiDepth, arXiv
    2503.23798). Costs a small matrix product, reads those weights.
    """

    wants_passing = True

    def write(self, passing: Passing, key: Tensor, value: Tensor) -> None:
        """Write at once."""
        self.cache.write(passing.layer, key, value, self.cache.slots()[passing.tokens])


class CopyFill(KvFill):
    """``copy``: the K/V of the nearest attention below that the token did run.

    Of the nearest above where it ran none below. (Unified Layer Skipping, arXiv 2404.06954;
    DREX, arXiv 2512.15705.) No matrix product; one gather and one write for all layers.
    """

    def __init__(self, attention: Sequence[Attention], cache: KvCache) -> None:
        super().__init__(attention, cache)
        self._plan: StepPlan | None = None
        self._planned: Copies | None = None
        self._parts: list[Copies] = []
        self._running: StepPlan | None = None
        self._checks: frozenset[int] = frozenset()
        self._checked: tuple[Tensor, Tensor] | None = None
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        keep_keys_and_values(attention, self._keep)

    def _keep(self, layer: int, key: Tensor, value: Tensor) -> None:
        if self._running is None:
            return
        if layer in self._checks:
            self._checked = key, value
        if self._parts and (rows := self._parts[-1].sources.get(layer)) is not None:
            self._kept[layer] = key[rows], value[rows]

    def begin(self, plan: StepPlan, skips: BoolArray, layout: Layout) -> None:
        """Find out what to copy where, when the plan is new; keep K/V from now on."""
        if plan is not self._plan:
            self._plan, self._planned = plan, Copies.build(plan, skips, layout)
            self._checks = frozenset(
                piece.layer for piece in plan.pieces if isinstance(piece, Check)
            )
        self._parts = [self._planned] if self._planned else []
        self._running = plan

    def leave(
        self, layer: int, tokens: IntArray, rest: StepPlan, skips: BoolArray, layout: Layout
    ) -> None:
        """Copy that layer's; see what is left of the copies that were planned."""
        assert self._running is not None and self._checked is not None
        above = torch.arange(layer + 1, skips.shape[1] // 2)
        if len(tokens):
            whole = int(layout.query_lens.sum())
            rows = torch.from_numpy(place_of_tokens(self._running, layer, whole)[tokens])
            key, value = (each[rows.repeat_interleave(len(above))] for each in self._checked)
            slots = self.cache.slots()[torch.from_numpy(tokens)].repeat_interleave(len(above))
            self.cache.write_many(above.repeat(len(tokens)), key, value, slots)
        done = self._parts.pop().up_to(layer) if self._parts else None
        left = Copies.build(rest, skips, layout, above=layer)
        self._parts += [part for part in (done, left) if part is not None]
        self._running = rest

    def finish(self) -> None:
        """Write all copies at once."""
        self._running, self._checked = None, None
        if not (parts := self._parts):
            return
        keys, values = zip(
            *(self._kept.pop(layer) for part in parts for layer in part.sources), strict=True
        )
        key, value = torch.cat(keys), torch.cat(values)
        layers, tokens = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("layers", "tokens")
        )
        self.cache.write_many(layers, key, value, self.cache.slots()[tokens])


#: Every strategy by the name that users write.
KV_FILLS: dict[str, type[KvFill]] = {"copy": CopyFill, "project": ProjectFill, "none": KvFill}
