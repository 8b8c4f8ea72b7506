# SPDX-License-Identifier: Apache-2.0
"""Lets tokens leave a step on their way up, and plans anew what is left of it.

An exit changes the plan of some tokens in the middle of a forward. Nobody else's changes, so
nobody leaves or stays because a neighbour did.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vllm_adaskip.classifiers import ExitGate
from vllm_adaskip.engine.kv_fill import KvFill
from vllm_adaskip.engine.layout import BoolArray, IntArray, Layout
from vllm_adaskip.engine.step_plan import StepPlan
from vllm_adaskip.engine.table import SequenceTable

#: Gives the residual pair ``[asked, hidden_size]`` of tokens by their index in the step.
Look = Callable[[Tensor], tuple[Tensor, Tensor]]


class StepExits:
    """One engine's early exits, step by step; nobody leaves if its method knows none.

    Who may leave is a candidate: each generated token of a gated row, or, with scope ``answer``,
    each gated row whose prompt becomes complete, of which the last token is looked at and all
    tokens leave.

    Attributes:
        is_open: whether somebody may leave the step that runs now.
        exits: ``[num_layers]`` tokens, or with scope ``answer`` requests, that left after each
            layer.
        left_out: ``[2 * num_layers]`` generated tokens that were thereby kept from each sub-layer;
            a whole answer's are of its prompt, which the `Tally` alone counts, by its last.

    """

    def __init__(
        self,
        scope: Literal["token", "answer"] | None,
        gate: ExitGate | None,
        table: SequenceTable,
        kv_fill: KvFill,
    ) -> None:
        self._scope = scope
        self._gate = gate
        self._table = table
        self._kv_fill = kv_fill
        self.is_open = False
        self.exits = np.zeros(table.num_layers, dtype=np.int64)
        self.left_out = np.zeros(2 * table.num_layers, dtype=np.int64)
        self._layers: frozenset[int] = frozenset()

    def arrange(self, layout: Layout) -> frozenset[int]:
        """Take a new step's rows; give the layers after which tokens may leave."""
        self._layers = frozenset()
        if self._scope is None:
            return self._layers
        rows = len(layout.query_lens)
        prompts = layout.query_lens > layout.generated
        gated = self._table.gated[:rows]
        self._gated = gated & (prompts if self._scope == "answer" else layout.generated > 0)
        if not self._gated.any():
            return self._layers
        self._planned_layout, self._planned_skips = layout, self._table.skips[:rows]
        # Plans of gated rows leave out the last layers, so they are as deep as they run layers.
        self._depths = (~self._planned_skips[:, 0::2]).sum(axis=1)
        self._rows = np.repeat(np.arange(rows), layout.query_lens)
        self._ends = np.cumsum(layout.query_lens)
        # The last token of a row's query is the last of its sequence.
        self._offsets = np.arange(len(self._rows)) - self._ends[self._rows]
        checks = set(self._gate.check_layers) if self._gate else set()
        if self._scope == "answer":
            checks |= set((self._depths[self._gated] - 1).tolist()) - {self._table.num_layers - 1}
        self._layers = frozenset(checks)
        return self._layers

    def begin(self, seq_lens: IntArray) -> None:
        """Start a step with the rows that were arranged; ``[rows]`` tokens of each sequence."""
        self.is_open = False
        if not self._layers:
            return
        past_prompt = seq_lens - self._table.prompt_lens[: len(seq_lens)]
        self._table.tally.reached[: len(seq_lens)] = past_prompt
        self._ages = past_prompt[self._rows] + self._offsets
        if self._scope == "answer":
            ready = np.flatnonzero(self._gated & (past_prompt >= 0))
            self._tokens = self._ends[ready] - past_prompt[ready] - 1
        else:
            warm_up = self._gate.warm_up if self._gate else 0
            self._tokens = np.flatnonzero(self._gated[self._rows] & (self._ages >= warm_up))
        self._waiting = np.arange(len(self._tokens))
        self.is_open = len(self._tokens) > 0
        if not self.is_open:
            return
        self._layout, self._skips = self._planned_layout, self._planned_skips
        self._left = np.zeros((len(self._tokens), 2 * self._table.num_layers), dtype=np.bool_)
        if self._gate:
            rows = self._rows[self._tokens].tolist()
            self._gate.begin([self._table.allowed.get(row) for row in rows])

    def after(self, layer: int, look: Look) -> StepPlan | None:
        """Ask who leaves after a layer; give the rest of the step if somebody does."""
        if not self.is_open or not len(self._waiting):
            return None
        leaves = self._asked(layer, look)
        if not leaves.any():
            return None
        out, self._waiting = self._waiting[leaves], self._waiting[~leaves]
        self.exits[layer] += len(out)
        leaving = self._leaving(out)
        above = np.arange(2 * self._table.num_layers) > 2 * layer + 1
        self._left[out] = ~self._planned_skips[self._rows[self._tokens[out]]] & above
        self._layout, source = self._layout.split(leaving)
        self._skips = self._skips[source]
        starts = np.cumsum(self._layout.query_lens) - self._layout.query_lens
        self._skips[leaving[starts]] |= above
        rest = StepPlan.build(
            self._skips,
            self._layout,
            with_passing=self._kv_fill.wants_passing,
            checks=self._layers,
            after=layer,
        )
        # A whole answer is read by nobody, so its prompt needs no K/V above.
        filled = np.flatnonzero(leaving) if self._scope == "token" else np.arange(0)
        self._kv_fill.leave(layer, filled, rest, self._skips, self._layout)
        return rest

    def finish(self) -> None:
        """Finish a step whose forward has run: count what was left out."""
        if self.is_open:
            own = self._tokens
            self._table.tally.add(self._rows[own], self._ages[own], self._left)
            if self._scope == "token":
                self.left_out += self._left.sum(axis=0)

    def _asked(self, layer: int, look: Look) -> BoolArray:
        """Tell which of those who wait leave now: the gate says so, or their plan ends here."""
        depths = self._depths[self._rows[self._tokens[self._waiting]]]
        leaves: BoolArray = depths == layer + 1 if self._scope == "answer" else depths < 0
        deeper = depths > layer + 1
        if self._gate and layer in self._gate.check_layers and deeper.any():
            asked = self._waiting[deeper]
            before, update = look(torch.from_numpy(self._tokens[asked]))
            leaves[deeper] = self._gate.exits(layer, asked, before, update)
        return leaves

    def _leaving(self, out: IntArray) -> BoolArray:
        """Give ``[tokens]`` of the step, True for those of the candidates that leave."""
        leaving = np.zeros(len(self._rows), dtype=np.bool_)
        if self._scope == "answer":
            gone = np.zeros(len(self._gated), dtype=np.bool_)
            gone[self._rows[self._tokens[out]]] = True
            return gone[self._rows]
        leaving[self._tokens[out]] = True
        return leaving
