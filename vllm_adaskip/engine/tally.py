# SPDX-License-Identifier: Apache-2.0
"""What a token gate really left out, sequence by sequence, as long as anybody may ask.

Counts stand with the rows of the persistent batch, so that a step adds to all of them at once.
When a sequence leaves its row they are added to what is remembered under the sequence's key.
"""

from __future__ import annotations

import numpy as np
from cachetools import LRUCache

from vllm_adaskip.engine.layout import BoolArray, IntArray

#: Keys that are remembered: some hundred bytes each, and who asks does so soon.
_REMEMBERED = 16_384


class Tally:
    """Of each row's sequence: generated tokens that ran, and that a gate kept from sub-layers.

    Each generated token counts once, when it runs first: a sequence that comes back after
    preemption goes on where it was, and its replayed tokens are passed over. (vLLM may run
    one token more than it returns, when it learns late that a sequence is finished.)

    Attributes:
        reached: ``[capacity]`` int64, the sequence's generated tokens that have run by now.

    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.reached = np.zeros(capacity, dtype=np.int64)
        self._before = np.zeros(capacity, dtype=np.int64)  # ran before they came into the row
        self._left_out = np.zeros((capacity, 2 * num_layers), dtype=np.int64)
        self._keys: list[bytes | None] = [None] * capacity
        self._gone: LRUCache[bytes, tuple[int, IntArray]] = LRUCache(_REMEMBERED)

    def enter(self, row: int, key: bytes, ran: int) -> None:
        """Count for the sequence in a row, of which ``ran`` generated tokens are counted."""
        self._keys[row] = key
        self.reached[row] = self._before[row] = ran

    def leave(self, row: int) -> None:
        """Remember what was counted for the sequence in a row, if any."""
        if (key := self._keys[row]) is None:
            return
        self._gone[key] = self._with(row, *self._gone.get(key, (0, 0)))
        self._keys[row] = None
        self._left_out[row] = 0

    def swap(self, one: int, other: int) -> None:
        """Exchange the sequences of two rows."""
        pair, swapped = [one, other], [other, one]
        for counts in (self.reached, self._before, self._left_out):
            counts[pair] = counts[swapped]
        self._keys[one], self._keys[other] = self._keys[other], self._keys[one]

    def add(self, rows: slice | IntArray, ages: IntArray, left_out: BoolArray) -> None:
        """Count a step.

        Args:
            rows: whose each token is: ``[tokens]``, or a slice where each row has one.
            ages: ``[tokens]`` generated tokens of its sequence that came before each.
            left_out: ``[tokens, 2 * num_layers]`` True where a gate kept it from a sub-layer.

        """
        left_out = left_out & (ages >= self._before[rows])[:, None]
        if isinstance(rows, slice):
            self._left_out[rows] += left_out
        else:
            np.add.at(self._left_out, rows, left_out)

    def of(self, key: bytes) -> tuple[int, IntArray] | None:
        """Give generated tokens that ran, and ``[2 * num_layers]`` how many were kept from each.

        All sequences with the key together, those that are still in a row too; None where
        there was none, or too many since.
        """
        found = self._gone.get(key)
        for row, other in enumerate(self._keys):
            if other == key:
                found = self._with(row, *(found or (0, 0)))
        return found

    def _with(self, row: int, tokens: int, left_out: IntArray | int) -> tuple[int, IntArray]:
        ran = max(int(self.reached[row] - self._before[row]), 0)
        return tokens + ran, left_out + self._left_out[row]
