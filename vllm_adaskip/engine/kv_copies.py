# SPDX-License-Identifier: Apache-2.0
"""Which K/V rows of one step are copied where, for ``kv_fill`` `copy`. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vllm_adaskip.engine.layout import BoolArray, IntArray, Layout
from vllm_adaskip.engine.step_plan import Segment, StepPlan


@dataclass(frozen=True)
class Copies:
    """Which K/V rows go where in one step.

    Attributes:
        sources: layer whose K/V are copied -> int64 ``[its copies]``, rows among the tokens
            that went through its attention.
        layers: int64 ``[copies]``, the layer written to; copies of one source lie together,
            in the order of ``sources``.
        tokens: int64 ``[copies]``, the token, as index in the step.

    """

    sources: dict[int, Tensor]
    layers: Tensor
    tokens: Tensor

    @classmethod
    def build(
        cls, plan: StepPlan, skips: BoolArray, layout: Layout, *, above: int = -1
    ) -> Copies | None:
        """Give the copies of a step; None when there are none.

        ``above`` leaves out those of K/V of that layer and all below.
        """
        row = np.repeat(np.arange(len(layout.query_lens)), layout.query_lens)  # of each token
        first_generated = np.cumsum(layout.query_lens) - layout.generated
        is_generated = np.arange(len(row)) >= first_generated[row]
        skipped = skips[:, 0::2]
        skipped = skipped & ~skipped.all(axis=1, keepdims=True)  # nothing to copy from
        tokens, layers = np.nonzero(skipped[row] & is_generated[:, None])
        if not len(tokens):
            return None
        source = nearest_executed(skipped)[row[tokens], layers]
        order = np.argsort(source, kind="stable")
        order = order[source[order] > above]
        if not len(order):
            return None
        source, layers, tokens = source[order], layers[order], tokens[order]
        sources = {
            layer: torch.from_numpy(place_of_tokens(plan, layer, len(row))[tokens[source == layer]])
            for layer in np.unique(source).tolist()
        }
        return cls(sources, torch.from_numpy(layers), torch.from_numpy(tokens))

    def up_to(self, layer: int) -> Copies | None:
        """Give those of K/V of a layer and all below; None when there are none."""
        sources = {source: rows for source, rows in self.sources.items() if source <= layer}
        count = sum(map(len, sources.values()))
        return Copies(sources, self.layers[:count], self.tokens[:count]) if count else None


def nearest_executed(skipped: BoolArray) -> IntArray:
    """Give, for ``[rows, layers]`` skipped attention, the layer to copy from."""
    own = np.where(skipped, -1, np.arange(skipped.shape[1]))
    below: IntArray = np.maximum.accumulate(own, axis=1)
    lowest = np.argmin(skipped, axis=1)  # the first that runs
    return np.where(below < 0, lowest[:, None], below)


def place_of_tokens(plan: StepPlan, layer: int, num_tokens: int) -> IntArray:
    """Where each token of the step lies among those that go through a layer's attention."""
    (segment,) = [
        piece
        for piece in plan.pieces
        if isinstance(piece, Segment) and 2 * layer in piece.sub_layers
    ]
    if segment.subset is None or segment.others is not None:  # all do
        return np.arange(num_tokens)
    place = np.zeros(num_tokens, dtype=np.int64)
    place[segment.subset.index] = np.arange(segment.subset.num_tokens)
    return place
