# SPDX-License-Identifier: Apache-2.0
"""What a method observed of prompts, kept beside the paged KV cache, block by block.

Addressed by the same slots and block tables as the KV cache, so that statistics follow the
blocks: a prompt computed in chunks adds to its blocks chunk after chunk, one found in the
prefix cache brings along what was observed when it was computed, and sequences that share
blocks share it. A decision gathers over the sequence's block table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_adaskip.classifiers import PromptStatistics


class PagedStatistics:
    """Sums over the prompt tokens of each block.

    Attributes:
        sums: ``[blocks, width + 1]`` float32; the last column counts the tokens.

    """

    def __init__(self, blocks: int, slots_per_block: int, width: int, device: torch.device) -> None:
        self.sums = torch.zeros(blocks, width + 1, device=device)
        self._slots = slots_per_block

    def new_values(self, tokens: int) -> Tensor:
        """Give ``[tokens, width + 1]`` for one step: zeros, and a last column of ones."""
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
        """Give the statistics of a whole prompt.

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
