# SPDX-License-Identifier: Apache-2.0
"""Shows prompts to a method that reads them, and lets it decide when one is complete."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_adaskip.classifiers import Lens, PromptStatistics
from vllm_adaskip.engine.compat.kv_cache import KvCache
from vllm_adaskip.engine.layout import IntArray, Layout, Subset
from vllm_adaskip.engine.paged_statistics import PagedStatistics
from vllm_adaskip.engine.state import SkipState


class PromptObserver:
    """One engine's paged statistics, step by step.

    Attributes:
        values: ``[tokens, width + 1]`` float32, what the method observes in the step that
            runs now; None when it has no prompt tokens, or the method does not read any. Of a
            method that is shown last tokens alone, ``[rows, width]``, a row for each prompt that
            becomes complete and has no plan.

    """

    def __init__(
        self,
        state: SkipState,
        cache: KvCache,
        hidden_size: int,
        device: torch.device,
        lens: Lens,
    ) -> None:
        self._state = state
        self._cache = cache
        classifier = state.planner.classifier
        self._width = classifier.width
        self._last_only = classifier.last_only
        self._observe = None
        if classifier.width:
            self._observe = classifier.observer(hidden_size, device, lens)
        self._statistics: PagedStatistics | None = None
        self.values: Tensor | None = None

    def begin(self, layout: Layout, seq_lens: IntArray, block_table: Tensor) -> None:
        """Start a step; ``seq_lens`` ``[rows]``, ``block_table`` ``[rows, blocks]``."""
        self.values = None
        if not self._width or np.array_equal(layout.generated, layout.query_lens):
            return
        if self._last_only:
            self._begin_last(layout, seq_lens)
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
        if self._last_only:
            chosen = self._last_tokens
            if tokens is not None:  # prompts run everything, so these are among them
                chosen = torch.searchsorted(_indices(tokens), chosen)
            self._observe(sub_layer, before[chosen], update[chosen], self.values)
            return
        values = self.values if tokens is None else self.values[tokens]
        self._observe(sub_layer, before, update, values[:, :-1])
        if isinstance(tokens, Tensor):  # indexing copied
            self.values[tokens] = values

    def finish(self) -> None:
        """Keep what was observed, and decide for the rows whose prompt is now complete."""
        if self.values is not None and self._last_only:
            self._decide_by_last(self.values.double().cpu().numpy())  # one copy, one sync
            self.values = None
        if self.values is None or self._statistics is None:
            return
        chosen = self._prompt_tokens
        self._statistics.add(self._cache.slots()[chosen], self.values[chosen])
        table, prompts = self._state.table, {}
        for row in table.undecided:
            prompt_len = int(table.prompt_lens[row])
            if self._seq_lens[row] >= prompt_len:
                last = self.values[self._query_ends[row] - (self._seq_lens[row] - prompt_len) - 1]
                prompts[row] = self._statistics.read(self._block_table[row], prompt_len, last)
        self._state.decide(prompts)
        self.values = None

    def _begin_last(self, layout: Layout, seq_lens: IntArray) -> None:
        """Find the last tokens of the prompts that become complete and have no plan."""
        table = self._state.table
        rows = np.array(sorted(table.undecided), dtype=np.int64)
        past_prompt = seq_lens[rows] - table.prompt_lens[rows]
        self._last_rows = rows[past_prompt >= 0]
        if not len(self._last_rows):
            return
        ends = np.cumsum(layout.query_lens)[self._last_rows]
        self._last_tokens = torch.from_numpy(ends - past_prompt[past_prompt >= 0] - 1)
        self.values = torch.zeros(len(ends), self._width, dtype=torch.float32)

    def _decide_by_last(self, values: NDArray[np.float64]) -> None:
        lengths = self._state.table.prompt_lens[self._last_rows].tolist()
        self._state.decide({
            row: PromptStatistics(prompt_len, last, last)
            for row, prompt_len, last in zip(self._last_rows.tolist(), lengths, values, strict=True)
        })  # fmt: skip


def _indices(tokens: slice | Tensor) -> Tensor:
    return torch.arange(tokens.start, tokens.stop) if isinstance(tokens, slice) else tokens
