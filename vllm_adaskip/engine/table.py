# SPDX-License-Identifier: Apache-2.0
"""The sequence table: which plan each row of the persistent batch follows.

It mirrors vLLM's persistent batch and knows nothing of vLLM. A feeder (`v1`, `v2`) keeps it in
step; the model reads it at every forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from vllm_adaskip.classifiers import SkipPlan
from vllm_adaskip.engine.counts import Counts
from vllm_adaskip.engine.prompt_plan import PromptPlan
from vllm_adaskip.engine.step import Bools

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Undecided:
    """A sequence whose plan waits for its prompt to be read.

    Attributes:
        prompt_hash: digest of the prompt's token ids, of its LoRA adapter's name, and of what its
            tokens leave out.
        budget: largest share of decoder compute its plan may keep.

    """

    prompt_hash: bytes
    budget: float


class SequenceTable:
    """Rows of the persistent batch: prompt length and left-out sub-layers of each.

    Attributes:
        prompt_lens: ``[capacity]`` int64, tokens of the row's prompt; 0 where the row is empty.
        skips: ``[capacity, 2 * num_layers]`` bool, True where the row leaves out the
            sub-layer, in running order attention 0, MLP 0, attention 1, ...
        wants: the same, what the method decided for the row, also where a guard has it run dense;
            nothing where the request named its plan.
        full_from: ``[capacity]`` int64, the first position of the row's prompt whose token runs
            everything; 0: all do.
        prompt_skips: ``[capacity, 2 * num_layers]``, what the tokens before leave out.
        undecided: rows that have no plan yet.
        drafts: ``[capacity]`` int64, tokens that may be drafted for the row at once.
        drafted: of rows with drafts that wait to be verified, each one's confidence.
        gated: ``[capacity]`` bool, True where the method's `Gate` may leave out more.
        allowed: of gated rows that say so, the token ids they may draw.
        counts: what ran, of rows that are gated and in all.
        version: grows with every change of a row, so that readers know when a step that they
            kept is stale.
        requests: sequences that entered so far.

    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.num_layers = num_layers
        self.prompt_lens = np.zeros(capacity, dtype=np.int64)
        self.skips = np.zeros((capacity, 2 * num_layers), dtype=np.bool_)
        self.wants = np.zeros_like(self.skips)
        self.full_from = np.zeros(capacity, dtype=np.int64)
        self.prompt_skips = np.zeros_like(self.skips)
        self.undecided: dict[int, Undecided] = {}
        self.drafts = np.zeros(capacity, dtype=np.int64)
        self.drafted: dict[int, list[float]] = {}
        self.gated = np.zeros(capacity, dtype=np.bool_)
        self.allowed: dict[int, Sequence[int]] = {}
        self.counts = Counts(num_layers, capacity)
        self.version = 0
        self.requests = 0

    @property
    def live_rows(self) -> int:
        """Rows that hold a sequence."""
        return int(np.count_nonzero(self.prompt_lens))

    @property
    def followed(self) -> Bools:
        """``[rows, 2 * num_layers]``, what each sequence that has a plan leaves out."""
        return self.skips[self.has_plan]

    @property
    def live_plans(self) -> int:
        """Distinct plans that sequences in the batch follow."""
        return len(np.unique(self.followed, axis=0))

    def add(
        self,
        row: int,
        plan: SkipPlan | Undecided,
        prompt_len: int,
        *,
        is_new: bool = True,
        gated: bool = False,
        prompt: PromptPlan | None = None,
        drafts: int = 0,
    ) -> None:
        """Put a sequence into a row; ``is_new`` is False for one that comes back."""
        self.remove(row)
        self.prompt_lens[row] = prompt_len
        if prompt is not None:
            self.full_from[row] = prompt.full_from(prompt_len)
            self.prompt_skips[row] = prompt.plan.mask()
        self.gated[row], self.drafts[row] = gated, drafts
        self.requests += is_new
        if isinstance(plan, Undecided):
            self.undecided[row] = plan
        else:
            self.follow(row, plan)

    @property
    def has_plan(self) -> Bools:
        """``[capacity]`` rows whose sequence has a plan."""
        found: Bools = self.prompt_lens > 0
        found[[*self.undecided]] = False
        return found

    def follow(self, row: int, plan: SkipPlan, wants: SkipPlan | None = None) -> None:
        """Let a row's sequence follow a plan from its next generated token on.

        ``wants`` is what a method decided for it, which a guard may have replaced.

        A sequence that runs an attention sub-layer again which it left out before reads
        there what `kv_fill` wrote in the meantime, so that must not be ``none``.
        """
        self.undecided.pop(row, None)
        self.skips[row] = plan.mask()
        self.wants[row] = False if wants is None else wants.mask()
        self.version += 1

    def remove(self, row: int) -> None:
        """Empty a row."""
        self.prompt_lens[row] = self.full_from[row] = 0
        self.skips[row] = self.wants[row] = self.prompt_skips[row] = False
        self.gated[row], self.drafts[row] = False, 0
        self.counts.leave(row)
        self.drafted.pop(row, None)
        self.allowed.pop(row, None)
        self.undecided.pop(row, None)
        self.version += 1

    def move(self, source: int, target: int) -> None:
        """Move a sequence to another row, whose own sequence is gone."""
        self.remove(target)
        self.swap(source, target)

    def swap(self, one: int, other: int) -> None:
        """Exchange the sequences of two rows."""
        pair, swapped = [one, other], [other, one]
        for values in (
            self.prompt_lens,
            self.skips,
            self.wants,
            self.full_from,
            self.prompt_skips,
            self.gated,
            self.drafts,
        ):
            values[pair] = values[swapped]
        self.counts.swap(one, other)
        _swap(self.undecided, one, other)
        _swap(self.allowed, one, other)
        _swap(self.drafted, one, other)
        self.version += 1


class BatchOrder:
    """Which request is in which row of the table."""

    def __init__(self, table: SequenceTable) -> None:
        self._table = table
        self._requests: list[str | None] = [None] * len(table.prompt_lens)
        self._rows: dict[str, int] = {}

    def enter(self, request: str) -> int:
        """Return an empty row, which is the request's now."""
        row = self._requests.index(None)
        self._requests[row], self._rows[request] = request, row
        return row

    def __contains__(self, request: str) -> bool:
        return request in self._rows

    def leave(self, request: str) -> None:
        """Empty the row of a request, if it has one."""
        if (row := self._rows.pop(request, None)) is not None:
            self._requests[row] = None
            self._table.remove(row)

    def leave_but(self, batch: Sequence[str]) -> None:
        """Empty the rows of all other requests."""
        for request in self._rows.keys() - set(batch):
            self.leave(request)

    def arrange(self, batch: Sequence[str]) -> None:
        """Bring the batch's requests into the first rows, in its order; others go behind them."""
        for row, request in enumerate(batch):
            if (source := self._rows[request]) == row:
                continue
            other = self._requests[row]
            self._table.swap(row, source)
            self._requests[row], self._requests[source] = request, other
            self._rows[request] = row
            if other is not None:
                self._rows[other] = source


def _swap(values: dict[int, Value], one: int, other: int) -> None:
    """Exchange what two rows have, if anything."""
    found = {row: values.pop(row) for row in (one, other) if row in values}
    for row, value in found.items():
        values[other if row == one else one] = value
