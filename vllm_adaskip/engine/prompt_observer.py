# SPDX-License-Identifier: Apache-2.0
"""Shows prompts to a method that reads them, and lets it decide when one is complete."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vllm_adaskip.engine.compat.kv_cache import KvCache
from vllm_adaskip.engine.layout import IntArray, Layout, Subset
from vllm_adaskip.engine.paged_statistics import PagedStatistics
from vllm_adaskip.engine.state import SkipState


class PromptObserver:
    """One engine's paged statistics, step by step.

    Attributes:
        values: ``[tokens, width + 1]`` float32, what the method observes in the step that
            runs now; None when it has no prompt tokens, or the method does not read any.

    """

    def __init__(
        self, state: SkipState, cache: KvCache, hidden_size: int, device: torch.device
    ) -> None:
        self._state = state
        self._cache = cache
        classifier = state.planner.classifier
        self._width = classifier.width
        self._observe = classifier.observer(hidden_size, device) if classifier.width else None
        self._statistics: PagedStatistics | None = None
        self.values: Tensor | None = None

    def begin(self, layout: Layout, seq_lens: IntArray, block_table: Tensor) -> None:
        """Start a step; ``seq_lens`` ``[rows]``, ``block_table`` ``[rows, blocks]``."""
        self.values = None
        if not self._width or np.array_equal(layout.generated, layout.query_lens):
            return
        prompt = Subset(layout, np.ones(len(layout.query_lens), dtype=np.bool_))
        if self._statistics is None:  # the KV cache is laid out by now
            blocks, slots = self._cache.geometry
            self._statistics = PagedStatistics(blocks, slots, self._width, block_table.device)
        self.values = self._statistics.new_values(int(layout.query_lens.sum()))
        self._prompt_tokens, self._seq_lens, self._block_table = (
            prompt.tokens,
            seq_lens,
            block_table,
        )
        self._query_ends = np.cumsum(layout.query_lens)

    def observe(
        self, sub_layer: int, before: Tensor, update: Tensor, tokens: slice | Tensor | None
    ) -> None:
        """Show a sub-layer's tokens, all of the step's or some, to the method.

        ``before`` ``[tokens, hidden]`` is the residual stream, ``update`` what it adds.
        """
        assert self.values is not None and self._observe is not None
        values = self.values if tokens is None else self.values[tokens]
        self._observe(sub_layer, before, update, values[:, :-1])
        if isinstance(tokens, Tensor):  # indexing copied
            self.values[tokens] = values

    def finish(self) -> None:
        """Keep what was observed, and decide for the rows whose prompt is now complete."""
        if self.values is None or self._statistics is None:
            return
        chosen = self._prompt_tokens
        self._statistics.add(self._cache.slots()[chosen], self.values[chosen])
        table = self._state.table
        for row in list(table.undecided):
            prompt_len = int(table.prompt_lens[row])
            if self._seq_lens[row] >= prompt_len:
                last = self.values[self._query_ends[row] - (self._seq_lens[row] - prompt_len) - 1]
                prompt = self._statistics.read(self._block_table[row], prompt_len, last)
                self._state.decide(row, prompt)
        self.values = None
