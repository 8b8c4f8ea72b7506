# SPDX-License-Identifier: Apache-2.0
"""The sequence table: which plan each row of the persistent batch follows.

It mirrors vLLM's persistent batch and knows nothing of vLLM. A feeder (today the V1
runner's, `v1_feeder`) keeps it in step; the model reads it at every forward.
"""

from __future__ import annotations

import numpy as np

from vllm_adaskip.classifiers import SkipPlan


class SequenceTable:
    """Rows of the persistent batch: prompt length and left-out sub-layers of each.

    Attributes:
        prompt_lens: ``[capacity]`` int64, tokens of the row's prompt.
        skips: ``[capacity, 2 * num_layers]`` bool, True where the row leaves out the
            sub-layer, in running order attention 0, MLP 0, attention 1, ...
        version: grows with every change of a row, so that readers know when a step plan
            they kept is stale.
        requests: sequences that entered so far.

    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.num_layers = num_layers
        self.prompt_lens = np.zeros(capacity, dtype=np.int64)
        self.skips = np.zeros((capacity, 2 * num_layers), dtype=np.bool_)
        self.version = 0
        self.requests = 0

    def add(self, row: int, plan: SkipPlan, prompt_len: int, *, is_new: bool) -> None:
        """Put a sequence into a row; ``is_new`` is False for one that comes back."""
        self.prompt_lens[row] = prompt_len
        self.skips[row] = plan.mask()
        self.requests += is_new
        self.version += 1

    def remove(self, row: int) -> None:
        """Empty a row."""
        self.prompt_lens[row] = 0
        self.skips[row] = False
        self.version += 1

    def move(self, source: int, target: int) -> None:
        """Move a sequence to another row, whose own sequence is gone."""
        self.prompt_lens[target] = self.prompt_lens[source]
        self.skips[target] = self.skips[source]
        self.remove(source)

    def swap(self, one: int, other: int) -> None:
        """Exchange the sequences of two rows."""
        pair, swapped = [one, other], [other, one]
        self.prompt_lens[pair] = self.prompt_lens[swapped]
        self.skips[pair] = self.skips[swapped]
        self.version += 1
