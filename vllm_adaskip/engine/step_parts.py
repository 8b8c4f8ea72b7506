# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a step go through a sub-layer, and which are put back. Pure."""

from __future__ import annotations

from collections.abc import Set

import numpy as np

from vllm_adaskip.engine.crossover import Crossover, Kind
from vllm_adaskip.engine.layout import BoolArray, Layout, Subset, Tokens


class StepParts:
    """Parts of one step's tokens; the same object where the same tokens are meant."""

    def __init__(self, layout: Layout, crossover: Crossover | None) -> None:
        self._layout = layout
        self._crossover = crossover
        self._everybody = np.arange(int(layout.query_lens.sum()))
        self._subsets: dict[bytes, Subset | None] = {}
        self._others: dict[Subset, Tokens] = {}

    def subset(self, skipping: BoolArray) -> Subset | None:
        """Give those that go through where these rows skip; None for everybody."""
        key = skipping.tobytes()
        if key not in self._subsets:
            subset = Subset(self._layout, skipping)
            is_whole = subset.num_tokens == len(self._everybody)
            self._subsets[key] = None if is_whole else subset
        return self._subsets[key]

    def others(self, subset: Subset | None, kind: Kind) -> Tokens | None:
        """Give the other tokens if this kind of thing is rather run for all; None if not."""
        if self._crossover is None or subset is None or not subset.num_tokens:
            return None
        if not self._crossover.runs_all(kind, subset.num_tokens, len(self._everybody)):
            return None
        if subset not in self._others:
            self._others[subset] = Tokens(np.delete(self._everybody, subset.index))
        return self._others[subset]


def kind_of(sub_layer: int, columns: BoolArray, alone: Set[int]) -> Kind:
    """Tell whether a sub-layer goes by itself, or the same tokens go through the whole layer."""
    other = sub_layer ^ 1
    if other not in alone and np.array_equal(columns[sub_layer], columns[other]):
        return "layer"
    return "mlp" if sub_layer % 2 else "attention"
