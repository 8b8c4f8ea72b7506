# SPDX-License-Identifier: Apache-2.0
"""The tally against a model that writes down every token of every sequence."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vllm_adaskip.engine.tally import Tally

LAYERS, ROWS = 2, 4
rows = st.integers(0, ROWS - 1)
keys = st.sampled_from([b"a", b"b", b"c"])


@dataclass
class Sequence:
    key: bytes
    before: int
    #: Age -> what it left out, when it ran first.
    ran: dict[int, frozenset[int]] = field(default_factory=dict)


class TallyFollowsSequences(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.tally = Tally(LAYERS, ROWS)
        self.live: dict[int, Sequence] = {}
        self.all: list[Sequence] = []

    @rule(row=rows, key=keys, before=st.integers(0, 3))
    def enter(self, row: int, key: bytes, before: int) -> None:
        self.leave(row)
        self.tally.enter(row, key, before)
        self.live[row] = Sequence(key, before)
        self.all.append(self.live[row])

    @rule(row=rows)
    def leave(self, row: int) -> None:
        self.tally.leave(row)
        self.live.pop(row, None)

    @rule(one=rows, other=rows)
    def swap(self, one: int, other: int) -> None:
        self.tally.swap(one, other)
        ours, theirs = self.live.pop(one, None), self.live.pop(other, None)
        self.live |= {row: x for row, x in ((one, theirs), (other, ours)) if x}

    @rule(seed=st.integers(0, 1 << 20))
    def step(self, seed: int) -> None:
        """Each sequence runs its next token; who just came, perhaps all since some age before."""
        rng = random.Random(seed)
        tokens: list[tuple[int, int]] = []
        for row in range(ROWS):
            one = self.live.get(row)
            next_age = one.before + len(one.ran) if one else 0
            first = rng.randint(0, next_age) if one and not one.ran else next_age
            tokens += [(row, age) for age in range(first, next_age + 1)]
        chosen = [rng.sample(range(2 * LAYERS), rng.randint(0, 2 * LAYERS)) for _ in tokens]
        drawn = dict(zip(tokens, map(frozenset, chosen), strict=True))
        table = np.zeros((len(tokens), 2 * LAYERS), dtype=np.bool_)
        for place, (row, age) in enumerate(tokens):
            if one := self.live.get(row):
                table[place, list(drawn[row, age])] = True
                self.tally.reached[row] = age + 1
                if age >= one.before:
                    one.ran.setdefault(age, drawn[row, age])
        rows, ages = (np.array(each) for each in zip(*tokens, strict=True))
        self.tally.add(slice(0, ROWS) if len(rows) == ROWS else rows, ages, table)

    @invariant()
    def sums_agree(self) -> None:
        for key in (b"a", b"b", b"c"):
            own = [one for one in self.all if one.key == key]
            found = self.tally.of(key)
            assert (found is None) == (not own)
            if found:
                tokens, left_out = found
                want = Counter(one for each in own for out in each.ran.values() for one in out)
                assert tokens == sum(len(each.ran) for each in own)
                assert left_out.tolist() == [want[sub_layer] for sub_layer in range(2 * LAYERS)]


TestTallyFollowsSequences = TallyFollowsSequences.TestCase
TestTallyFollowsSequences.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None
)
