# SPDX-License-Identifier: Apache-2.0
"""Reads prompts for a method, and lets it decide when a prompt is complete.

What a method keeps of prompts lies beside the paged KV cache, block by block, and is addressed by
the same slots and block tables. So it follows the blocks: a prompt computed in chunks adds to its
blocks chunk after chunk, a prompt found in the prefix cache brings along what was observed when
it was computed, and sequences that share blocks share it. A decision gathers over the
sequence's block table.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vllm_adaskip.classifiers import Lens, PromptStatistics, Stream
from vllm_adaskip.engine.compat.kv_cache import KvCache
from vllm_adaskip.engine.decide import SkipState
from vllm_adaskip.engine.step import Ints, Part, Step, Tokens


class PagedStatistics:
    """Sums over the prompt tokens of each block.

    Attributes:
        sums: ``[blocks, width + 1]`` float32; the last column counts the tokens.

    """

    def __init__(self, blocks: int, slots_per_block: int, width: int, device: torch.device) -> None:
        self.sums = torch.zeros(blocks, width + 1, device=device)
        self._slots = slots_per_block

    def new_values(self, tokens: int) -> Tensor:
        """Return ``[tokens, width + 1]`` for one step: zeros, and a last column of ones."""
        values = self.sums.new_zeros(tokens, self.sums.shape[1])
        values[:, -1] = 1
        return values

    def add(self, slots: Tensor, values: Tensor) -> None:
        """Add what was observed of prompt tokens.

        A block begins anew when its first slot is written: whatever it held before belonged
        to another sequence.

        Args:
            slots: ``[tokens]`` int64, as in the KV cache.
            values: ``[tokens, width + 1]``, from `new_values`.

        """
        blocks = slots // self._slots
        self.sums[blocks[slots % self._slots == 0]] = 0
        self.sums.index_add_(0, blocks, values)

    def read(self, block_table: Tensor, prompt_len: int, last: Tensor) -> PromptStatistics:
        """Return the statistics of a whole prompt.

        Args:
            block_table: ``[blocks]`` of its sequence, in order.
            prompt_len: its tokens.
            last: ``[width + 1]`` what was observed of its last token.

        Raises:
            RuntimeError: some of its tokens were not observed.

        """
        blocks = block_table[: -(-prompt_len // self._slots)].long()
        sums = self.sums[blocks].double().sum(dim=0)
        total, of_last = torch.stack((sums, last.double())).cpu().numpy()  # one copy, one sync
        if total[-1] != prompt_len:
            raise RuntimeError(
                f"vllm-adaskip: {total[-1]:.0f} of a prompt's {prompt_len} tokens were observed; "
                "this is a bug, please report it"
            )
        return PromptStatistics(prompt_len, total[:-1] / prompt_len, of_last[:-1])


class PromptReader:
    """Shows a method the prompt tokens of each step; nothing is read if its ``width`` is 0.

    Attributes:
        is_open: whether the method reads something in the step that runs now.
        statistics: what was observed; None where nothing is yet, or of last tokens alone.

    """

    def __init__(
        self, state: SkipState, cache: KvCache, hidden_size: int, device: torch.device, lens: Lens
    ) -> None:
        self._state = state
        self._cache = cache
        classifier = state.planner.classifier
        self._width = classifier.width
        self._last_only = classifier.last_only
        if classifier.reads_whole_prompts and cache.forgets:
            raise ValueError(
                f"method {state.planner.facts.method!r} reads whole prompts, whose first blocks a "
                "model lets go of if all its layers have a sliding window; add "
                "--disable-sliding-window, which limits sequences to the window, or use another "
                "method"
            )
        self._observe = classifier.observer(hidden_size, device, lens) if self._width else None
        self.statistics: PagedStatistics | None = None
        self.is_open = False

    def begin(self, step: Step, seq_lens: Ints, block_table: Tensor) -> None:
        """Start a step; ``seq_lens`` ``[rows]``, ``block_table`` ``[rows, blocks]``."""
        self.is_open = False
        if not self._width or step.num_generated == step.num_tokens:
            return
        table = self._state.table
        rows, ends = step.prompt_ends(seq_lens, table.prompt_lens[: len(seq_lens)])
        complete = {row: end for row, end in zip(rows.tolist(), ends, strict=True)}
        self._complete = {row: complete[row] for row in sorted(complete.keys() & table.undecided)}
        if self._last_only:
            self._tokens = Tokens(np.array([*self._complete.values()], dtype=np.int64))
            self.is_open = bool(self._complete)
            self._values = torch.zeros(len(self._complete), self._width, dtype=torch.float32)
            return
        self.is_open = True
        self._tokens = step.tokens(~step.generated)
        self._block_table = block_table
        if self.statistics is None:  # the KV cache is laid out by now
            blocks, slots = self._cache.geometry
            self.statistics = PagedStatistics(blocks, slots, self._width, block_table.device)
        self._values = self.statistics.new_values(step.num_tokens)

    def observe(self, sub_layer: int, stream: Stream, part: Part | None) -> None:
        """Show the method what a sub-layer did to the tokens that ran it."""
        assert self._observe is not None and stream.before is not None
        before, update = stream.before, stream.update
        if self._last_only:  # prompts run everything, so these tokens are among the part's
            chosen = self._tokens.places(part).on(update.device)
            self._observe(sub_layer, before[chosen], update[chosen], self._values)
            return
        tokens = slice(None) if part is None else part.on(update.device)
        values = self._values[tokens]
        self._observe(sub_layer, before, update, values[:, :-1])
        if isinstance(tokens, Tensor):  # indexing copied
            self._values[tokens] = values

    def finish(self) -> None:
        """Keep what was observed, and decide for the rows whose prompt is now complete."""
        if not self.is_open:
            return
        self.is_open = False
        lengths = self._state.table.prompt_lens
        if self._last_only:
            found = self._values.double().cpu().numpy()  # one copy, one sync
            prompts = {
                row: PromptStatistics(int(lengths[row]), last, last)
                for row, last in zip(self._complete, found, strict=True)
            }
        else:
            prompts = self._add_and_read(lengths)
        self._state.decide(prompts)

    def _add_and_read(self, lengths: Ints) -> dict[int, PromptStatistics]:
        assert self.statistics is not None
        tokens = self._tokens.on(self._values.device)
        self.statistics.add(self._cache.slots()[tokens], self._values[tokens])
        return {
            row: self.statistics.read(self._block_table[row], int(lengths[row]), self._values[end])
            for row, end in self._complete.items()
        }
