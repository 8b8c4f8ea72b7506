# SPDX-License-Identifier: Apache-2.0
"""Lets a method's gate close sub-layers to single tokens, in the step that runs now.

Everything here but the gate's own look at the stream is host arithmetic on small arrays; on
an accelerator the index of who goes on would have to be copied there, layer by layer.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from vllm_adaskip.classifiers import TokenGate
from vllm_adaskip.engine.layout import BoolArray, IntArray, Layout, Tokens
from vllm_adaskip.engine.step_plan import Segment
from vllm_adaskip.engine.table import SequenceTable

#: Makes a token's age negative whatever its place in the sequence.
_NEVER = -(1 << 40)


class StepGate:
    """One engine's token gate, step by step; closes nothing if its method has none.

    Attributes:
        guarded: sub-layers for which the gate decides who goes through, in the step that runs
            now; none as long as it would close nothing.
        left_out: ``[2 * num_layers]`` generated tokens that were kept from each sub-layer.

    """

    def __init__(self, gate: TokenGate | None, table: SequenceTable) -> None:
        self._gate = gate
        self._table = table
        self.guarded: frozenset[int] = frozenset()
        self.left_out = np.zeros(2 * table.num_layers, dtype=np.int64)
        self._rows: IntArray | slice | None = None
        self._is_counting = False

    def arrange(self, layout: Layout) -> frozenset[int]:
        """Take a new step's rows; give the sub-layers whose tokens are known only when they run."""
        rows = len(layout.query_lens)
        gated = self._table.gated[:rows] & (layout.generated > 0)
        self._rows = None
        if self._gate is None or not gated.any():
            return frozenset()
        sub_layers = self._gate.sub_layers
        row_of = np.repeat(np.arange(rows), layout.query_lens)
        one_each = (layout.query_lens == 1).all()
        self._rows = slice(0, rows) if one_each else row_of  # a slice picks without copying
        ends = np.cumsum(layout.query_lens)
        self._tokens = np.arange(ends[-1])
        self._left = np.zeros((ends[-1], 2 * self._table.num_layers), dtype=np.bool_)
        # The last token of a row's query is the last of its sequence.
        from_prompt = np.where(gated, -ends - self._table.prompt_lens[:rows], _NEVER)
        self._offsets = self._tokens + from_prompt[row_of]
        self._planned = self._table.skips[:rows, sorted(sub_layers)].sum(axis=1)[row_of]
        return sub_layers

    def begin(self, seq_lens: IntArray) -> None:
        """Start a step with the rows that were arranged; ``[rows]`` tokens of each sequence."""
        self.guarded = frozenset()
        if self._gate is None or self._rows is None:
            return
        rows = len(seq_lens)
        self._table.tally.reached[:rows] = seq_lens - self._table.prompt_lens[:rows]
        self._ages = seq_lens[self._rows] + self._offsets
        if self._gate.begin(self._ages, self._planned):
            self.guarded = self._gate.sub_layers

    def narrowed(self, segment: Segment) -> Segment | None:
        """Give a guarded segment with those of its tokens that go through; None for none."""
        assert self._gate is not None
        (sub_layer,) = segment.sub_layers
        assert sub_layer % 2, "attention would need metadata for those who go through"
        self._is_shown = True
        closed = self._gate.closed(sub_layer)
        if closed is None:
            return segment
        chosen = slice(None) if segment.subset is None else segment.subset.index
        leaving = self._agreed(closed[chosen], chosen)
        if leaving is None or not (count := np.count_nonzero(leaving)):
            return segment
        self.left_out[sub_layer] += count
        self._left[chosen, sub_layer] = leaving
        self._is_counting = True
        if count == len(leaving):
            return None
        return Segment(segment.sub_layers, Tokens(self._tokens[chosen][~leaving]))

    def observe(self, segment: Segment, before: Tensor, update: Tensor) -> None:
        """Show the gate what a guarded segment did: ``[tokens, hidden]`` of the whole step."""
        assert self._gate is not None
        if self._is_shown:  # tokens that were told to leave it out have nothing to show
            self._gate.observe(segment.sub_layers[0], before, update)

    def _agreed(self, votes: BoolArray, chosen: slice | IntArray) -> BoolArray | None:
        """Tell which of the chosen tokens leave a sub-layer out by the batch rule, if any."""
        assert self._gate is not None
        if (rule := self._gate.batch_rule) is None:
            return votes
        agreed = rule(votes, self._gate.deciding[chosen])
        self._is_shown = agreed is None or agreed is votes
        return agreed

    def finish(self) -> None:
        """Finish a step whose forward has run: count for each row what was left out."""
        if self._is_counting:
            assert self._rows is not None
            self._table.tally.add(self._rows, self._ages, self._left)
            self._left.fill(False)
            self._is_counting = False
