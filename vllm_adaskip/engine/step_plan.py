# SPDX-License-Identifier: Apache-2.0
"""The step plan: for each sub-layer of one forward, which tokens go through it.

Pure: made from arrays, without vLLM.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from vllm_adaskip.engine.crossover import Crossover
from vllm_adaskip.engine.joined_subsets import JoinedSubsets
from vllm_adaskip.engine.layout import BoolArray, IntArray, Layout, Subset, Tokens, generated_tokens
from vllm_adaskip.engine.scaling import DueFactors, Scaling
from vllm_adaskip.engine.step_parts import StepParts, kind_of
from vllm_adaskip.engine.table import Factors


@dataclass(frozen=True)
class Segment:
    """Sub-layers in a row that the same tokens go through; sub-layers with none are left out.

    Attributes:
        sub_layers: indices in running order, attention ``2 * l`` and MLP ``2 * l + 1``.
        subset: the tokens, or None for all of the step; a `Subset` if attention is among
            the sub-layers.
        others: the other tokens, where it is cheaper to run all and to put these back.

    """

    sub_layers: tuple[int, ...]
    subset: Tokens | None
    others: Tokens | None = None

    @cached_property
    def attention(self) -> tuple[int, ...]:
        """Layers whose attention is among them."""
        return tuple(sub_layer // 2 for sub_layer in self.sub_layers if sub_layer % 2 == 0)


@dataclass(frozen=True)
class Passing:
    """Tokens that pass by a layer's attention, where `kv_fill` may give them K/V.

    Attributes:
        layer: the decoder layer.
        tokens: index of these tokens in the step, as in `Subset`.

    """

    layer: int
    tokens: slice | torch.Tensor


@dataclass(frozen=True)
class Check:
    """Where tokens may leave the step: ``layer`` has run, and an `ExitGate` is asked."""

    layer: int


Piece = Segment | Passing | Scaling | Check


@dataclass(frozen=True)
class StepPlan:
    """What one forward runs.

    Attributes:
        pieces: in running order; a sub-layer in none of the segments is not launched. Each
            `Passing` stands where its tokens' residual stream is that which the layer
            would have seen, each `Scaling` before anything that looks at its tokens' stream; each
            `Check` behind its layer.
        generated_run: ``[2 * num_layers]`` generated tokens that go through each sub-layer.

    """

    pieces: tuple[Piece, ...]
    generated_run: IntArray

    @property
    def is_dense(self) -> bool:
        """True when every token goes through every sub-layer."""
        whole = [
            len(piece.sub_layers)
            for piece in self.pieces
            if isinstance(piece, Segment) and piece.subset is None
        ]
        return sum(whole) == len(self.generated_run)

    @cached_property
    def attention_subsets(self) -> tuple[Subset, ...]:
        """Subsets for which some layer's attention runs, in running order."""
        segments = [piece for piece in self.pieces if isinstance(piece, Segment)]
        found = [
            segment.subset for segment in segments if segment.attention and segment.others is None
        ]
        return tuple(dict.fromkeys(one for one in found if isinstance(one, Subset)))

    @cached_property
    def joined(self) -> JoinedSubsets | None:
        """These together; None if there are none."""
        return JoinedSubsets(self.attention_subsets) if self.attention_subsets else None

    @cached_property
    def discarded(self) -> int:
        """Tokens that run a sub-layer for nothing, over all sub-layers."""
        segments = [piece for piece in self.pieces if isinstance(piece, Segment)]
        return sum(
            segment.others.num_tokens * len(segment.sub_layers)
            for segment in segments
            if segment.others is not None
        )

    @classmethod
    def build(
        cls,
        skips: BoolArray,
        layout: Layout,
        *,
        with_passing: bool = False,
        alone: Set[int] = frozenset(),
        factors: Factors | None = None,
        checks: Set[int] = frozenset(),
        after: int = -1,
        crossover: Crossover | None = None,
    ) -> StepPlan:
        """Plan a step, or the rest of it.

        Args:
            skips: ``[rows, 2 * num_layers]``, True where the row leaves out the sub-layer.
            layout: the rows' tokens; prompt tokens go through everything whatever
                ``skips`` says.
            with_passing: also say where tokens pass by an attention sub-layer.
            alone: sub-layers that get a segment of their own.
            factors: like ``skips``, what left-out sub-layers multiply the stream by; None: nothing.
            checks: layers after which tokens may leave.
            after: the layer that has run already; -1: none.
            crossover: when to run all; None: never. Not asked about sub-layers ``alone``, whose
                tokens are known only when they run.

        """
        following = layout.generated if layout.following is None else layout.following
        skipping = skips & (following > 0)[:, None]
        generated_run = layout.generated @ ~skipping
        columns = np.ascontiguousarray(skipping.T)
        if not (alone or checks or columns.any()):  # a prompt, most often
            everything = Segment(tuple(range(2 * (after + 1), len(columns))), None)
            return cls((everything,), generated_run)
        parts = StepParts(layout, crossover)
        pieces: list[Piece] = []
        due = DueFactors(layout, factors)
        for sub_layer in range(2 * (after + 1), len(columns)):
            if sub_layer % 2 == 0 and sub_layer // 2 - 1 in checks and sub_layer // 2 - 1 > after:
                pieces.append(Check(sub_layer // 2 - 1))
            column = columns[sub_layer]
            chosen = parts.subset(column)
            kind = kind_of(sub_layer, columns, alone)
            others = None if sub_layer in alone else parts.others(chosen, kind)
            last = pieces[-1] if pieces else None
            goes_on = isinstance(last, Segment) and last.subset is chosen and last.others is others
            goes_on = goes_on and alone.isdisjoint((sub_layer, sub_layer - 1))
            goes_on = goes_on and not due.any_of(~column)
            # Who passes by here ran nothing of a segment that goes on: before or after
            # it is the same to them, and before it leaves the segment in one piece.
            at = len(pieces) - 1 if goes_on else len(pieces)
            passes_by = with_passing and chosen is not None and sub_layer % 2 == 0
            if scaling := due.settle(~column | passes_by):
                pieces.insert(at, scaling)
                at += 1
            if passes_by:
                pieces.insert(at, Passing(sub_layer // 2, generated_tokens(layout, column)))
            due.add(column, sub_layer)
            if chosen is not None and chosen.num_tokens == 0:
                continue
            if goes_on:
                assert isinstance(last, Segment)
                pieces[-1] = Segment((*last.sub_layers, sub_layer), chosen, others)
            else:
                pieces.append(Segment((sub_layer,), chosen, others))
        if scaling := due.settle(layout.generated > 0):
            pieces.append(scaling)
        return cls(tuple(pieces), generated_run)
