# SPDX-License-Identifier: Apache-2.0
"""The table against a dict that is moved about in the plainest way."""

from collections.abc import Callable

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vllm_adaskip import SkipPlan
from vllm_adaskip.engine.step import Step
from vllm_adaskip.engine.table import SequenceTable, Undecided

LAYERS, ROWS = 3, 6
rows = st.integers(0, ROWS - 1)
masks = st.integers(0, (1 << LAYERS) - 1)
prompts = st.integers(1, 99)
flags = st.booleans()


class TableFollowsBatch(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.table = SequenceTable(LAYERS, ROWS)
        self.model: dict[int, tuple[SkipPlan | Undecided, int, bool]] = {}
        self.entered = 0

    @rule(row=rows, masks=st.tuples(masks, masks), prompt=prompts, is_new=flags, gated=flags)
    def add(self, row: int, masks: tuple[int, int], prompt: int, is_new: bool, gated: bool) -> None:
        plan = SkipPlan(LAYERS, *masks)
        self.table.add(row, plan, prompt, is_new=is_new, gated=gated)
        self.model[row] = plan, prompt, gated
        self.entered += is_new

    @rule(row=rows, prompt=prompts)
    def add_undecided(self, row: int, prompt: int) -> None:
        undecided = Undecided(bytes([row, prompt]), 0.5)
        self.table.add(row, undecided, prompt)
        self.model[row] = undecided, prompt, False
        self.entered += 1

    @rule(row=rows, attention=masks)
    def follow(self, row: int, attention: int) -> None:
        if row in self.model:
            plan = SkipPlan(LAYERS, attention)
            self.table.follow(row, plan)
            self.model[row] = plan, *self.model[row][1:]

    @rule(row=rows)
    def remove(self, row: int) -> None:
        self.table.remove(row)
        self.model.pop(row, None)

    @rule(old=rows, new=rows)
    def move(self, old: int, new: int) -> None:
        if old not in self.model or old == new:
            return
        self.table.move(old, new)
        self.model[new] = self.model.pop(old)

    @rule(one=rows, other=rows)
    def swap(self, one: int, other: int) -> None:
        self.table.swap(one, other)
        ours, theirs = self.model.pop(one, None), self.model.pop(other, None)
        if theirs:
            self.model[one] = theirs
        if ours:
            self.model[other] = ours

    @rule(row=rows)
    def every_change_raises_the_version(self, row: int) -> None:
        before = self.table.version
        self.table.remove(row)
        self.model.pop(row, None)
        assert self.table.version > before

    @invariant()
    def rows_agree(self) -> None:
        assert self.table.requests == self.entered
        assert self.table.live_rows == len(self.model)
        plans = [plan for plan, *_ in self.model.values() if isinstance(plan, SkipPlan)]
        assert self.table.live_plans == len({*plans})
        assert sorted(map(SkipPlan.of_mask, self.table.followed), key=str) == sorted(plans, key=str)
        for row in range(ROWS):
            plan, prompt, gated = self.model.get(row, (SkipPlan(LAYERS), 0, False))
            waits = isinstance(plan, Undecided)
            assert self.table.undecided.get(row) == (plan if waits else None)
            mask = np.zeros(2 * LAYERS, bool) if isinstance(plan, Undecided) else plan.mask()
            assert (self.table.skips[row] == mask).all()
            assert self.table.prompt_lens[row] == prompt
            assert self.table.gated[row] == gated


TestTableFollowsBatch = TableFollowsBatch.TestCase
TestTableFollowsBatch.settings = settings(max_examples=60, stateful_step_count=30)


def test_allowed_tokens_move_with_their_sequence() -> None:
    table = SequenceTable(LAYERS, ROWS)
    for row in (0, 1):
        table.add(row, SkipPlan(LAYERS), 3, gated=True)
    table.allowed = {0: [7], 1: [8, 9]}
    table.swap(0, 1)
    assert table.allowed == {1: [7], 0: [8, 9]}
    table.move(1, 4)
    assert table.allowed == {4: [7], 0: [8, 9]}
    table.swap(0, 2)
    table.remove(4)
    assert table.allowed == {2: [8, 9]}


def test_what_ran_moves_with_its_sequence_and_stays_when_it_leaves() -> None:
    table = SequenceTable(LAYERS, ROWS)
    for row, key in enumerate((b"a", b"b")):
        table.add(row, SkipPlan(LAYERS), 3, gated=True)
        table.counts.enter(row, key, 0)
    skips = np.array([[True] * 2 * LAYERS, [False] * 2 * LAYERS])
    lengths = np.array([4, 4])
    step = Step.of(np.arange(3), lengths, table.prompt_lens[:2], skips)
    table.counts.add_gated(step, table.gated[:2], lengths - 3)
    table.swap(0, 1)
    step = Step.of(np.arange(3), lengths + 1, table.prompt_lens[:2], skips[::-1])
    table.counts.add_gated(step, table.gated[:2], lengths - 2)
    table.move(1, 4)
    for leaves in (False, True):
        if leaves:
            table.remove(4)
        for key, left_out in ((b"a", 2), (b"b", 0)):
            found = table.counts.of(key)
            assert found is not None and found[0] == 2 and (found[1] == left_out).all()
    # Whoever enters the row next is counted from nothing.
    table.add(4, SkipPlan(LAYERS), 3, gated=True)
    table.counts.enter(4, b"c", 0)
    found = table.counts.of(b"c")
    assert found is not None and found[0] == 0 and not found[1].any()
    # Rows that still hold a sequence move with it.
    table.swap(0, 4)
    table.remove(4)
    found = table.counts.of(b"b")
    assert found is not None and found[0] == 2


def test_every_change_of_a_row_raises_the_version() -> None:
    """By which the engine knows that a step it kept is stale."""
    table, plan = SequenceTable(LAYERS, ROWS), SkipPlan(LAYERS)
    changes: list[Callable[[], None]] = [
        lambda: table.add(0, Undecided(b"", 0.5), 3),
        lambda: table.follow(0, plan),
        lambda: table.add(1, plan, 3),
        lambda: table.swap(0, 1),
        lambda: table.move(1, 2),
        lambda: table.remove(2),
    ]
    for change in changes:
        before = table.version
        change()
        assert table.version > before
