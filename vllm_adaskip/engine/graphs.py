# SPDX-License-Identifier: Apache-2.0
"""Which steps replay a CUDA graph: one token of every row, and one plan for all. Pure.

A graph fixes what is launched, so each plan needs its own; dense is one of the plans. A step with
fewer rows than a graph was captured for is padded.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from typing import NamedTuple

from vllm_adaskip.classifiers import SkipPlan
from vllm_adaskip.engine.step import Bools, Ints, Step

#: Rows; a step is padded by a third at most from 4 rows on.
SIZES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


class Entry(NamedTuple):
    """One graph: the plan of all rows, and the rows it was captured for."""

    plan: SkipPlan
    size: int


class GraphBook:
    """The plans and sizes of an engine's graphs.

    Attributes:
        plans: dense first.
        sizes: rows, ascending.
        replayed: steps that replayed a graph so far.

    """

    def __init__(self, plans: Iterable[SkipPlan], num_layers: int, most_rows: int) -> None:
        """Take the plans that are known when the engine starts, and its largest batch."""
        self.plans = [*dict.fromkeys([SkipPlan(num_layers), *plans])]
        self.sizes = sorted({min(size, most_rows) for size in SIZES})
        self.replayed = 0
        self._plans = {plan.mask().tobytes(): plan for plan in self.plans}

    def entry(self, skips: Bools, ends: Ints, seq_lens: Ints, prompt_lens: Ints) -> Entry | None:
        """Return the graph that a step may replay; None: it has none.

        Args:
            skips: ``[rows, 2 * num_layers]`` what each row leaves out.
            ends: ``[rows]`` where each row's tokens end in the step.
            seq_lens: ``[rows]`` tokens of the sequence, this step's included.
            prompt_lens: ``[rows]`` tokens of its prompt.

        """
        rows = len(skips)
        if not 0 < rows <= self.sizes[-1] or ends[-1] != rows or (seq_lens <= prompt_lens).any():
            return None
        if (plan := self._plans.get(skips[0].tobytes())) is None or (skips != skips[0]).any():
            return None
        return Entry(plan, self.sizes[bisect_left(self.sizes, rows)])

    def step(self, entry: Entry) -> Step:
        """Return the step that an entry's graph holds: every row decodes."""
        return Step.of_one_plan(entry.plan.mask(), entry.size)
