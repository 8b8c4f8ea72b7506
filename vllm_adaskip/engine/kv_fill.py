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
from vllm_adaskip.engine.kv_copies import Copies
from vllm_adaskip.engine.layout import BoolArray, Layout
from vllm_adaskip.engine.step_plan import Passing, StepPlan

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
        self._copies: Copies | None = None
        self._is_running = False
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        keep_keys_and_values(attention, self._keep)

    def _keep(self, layer: int, key: Tensor, value: Tensor) -> None:
        if not self._is_running or self._copies is None:
            return
        if (rows := self._copies.sources.get(layer)) is not None:
            self._kept[layer] = key[rows], value[rows]

    def begin(self, plan: StepPlan, skips: BoolArray, layout: Layout) -> None:
        """Find out what to copy where, when the plan is new; keep K/V from now on."""
        if plan is not self._plan:
            self._plan, self._copies = plan, Copies.build(plan, skips, layout)
        self._is_running = True

    def finish(self) -> None:
        """Write all copies at once."""
        self._is_running = False
        if (copies := self._copies) is None:
            return
        keys, values = zip(*(self._kept.pop(layer) for layer in copies.sources), strict=True)
        key, value = torch.cat(keys), torch.cat(values)
        self.cache.write_many(copies.layers, key, value, self.cache.slots()[copies.tokens])


#: Every strategy by the name that users write.
KV_FILLS: dict[str, type[KvFill]] = {"copy": CopyFill, "project": ProjectFill, "none": KvFill}
