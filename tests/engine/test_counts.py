# SPDX-License-Identifier: Apache-2.0
"""Counts by sequence against a model that writes down every token of every sequence."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vllm_adaskip.engine.counts import Counts
from vllm_adaskip.engine.step import Step

LAYERS, ROWS = 2, 4
rows = st.integers(0, ROWS - 1)
keys = st.sampled_from([b"a", b"b", b"c"])


@dataclass
class Sequence:
    key: bytes
    before: int
    #: Age -> what it left out, when it ran first.
    ran: dict[int, frozenset[int]] = field(default_factory=dict)


class CountsFollowSequences(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts(LAYERS, ROWS)
        self.live: dict[int, Sequence] = {}
        self.all: list[Sequence] = []

    @rule(row=rows, key=keys, before=st.integers(0, 3))
    def enter(self, row: int, key: bytes, before: int) -> None:
        self.leave(row)
        self.counts.enter(row, key, before)
        self.live[row] = Sequence(key, before)
        self.all.append(self.live[row])

    @rule(row=rows)
    def leave(self, row: int) -> None:
        self.counts.leave(row)
        self.live.pop(row, None)

    @rule(one=rows, other=rows)
    def swap(self, one: int, other: int) -> None:
        self.counts.swap(one, other)
        ours, theirs = self.live.pop(one, None), self.live.pop(other, None)
        self.live |= {row: x for row, x in ((one, theirs), (other, ours)) if x}

    @rule(seed=st.integers(0, 1 << 20))
    def step(self, seed: int) -> None:
        """Each sequence runs its next token; who just came, perhaps all since some age before."""
        rng = random.Random(seed)
        spans: list[tuple[int, int, int]] = []  # row, age of its last token, tokens
        for row in range(ROWS):
            one = self.live.get(row)
            next_age = one.before + len(one.ran) if one else 0
            first = rng.randint(0, next_age) if one and not one.ran else next_age
            cuts = sorted(rng.sample(range(first, next_age + 1), rng.randint(0, 1)))
            bounds = [first, *(cut for cut in cuts if cut > first), next_age + 1]
            spans += [(row, end - 1, end - start) for start, end in pairwise(bounds)]
        runs = np.array([[rng.random() < 0.5 for _ in range(2 * LAYERS)] for _ in spans])
        last = {row: age for row, age, _ in spans}
        behind = np.array([last[row] - age for row, age, _ in spans])
        for place, (row, age, length) in enumerate(spans):
            left_out = frozenset(np.flatnonzero(~runs[place]).tolist())
            for own in range(age - length + 1, age + 1):
                if (one := self.live.get(row)) and own >= one.before:
                    one.ran.setdefault(own, left_out)
        rows, lengths = (np.array([span[i] for span in spans]) for i in (0, 2))
        step = Step(rows, lengths, behind, np.ones(len(spans), dtype=bool), runs)
        gated = np.array([row in self.live for row in range(ROWS)])
        self.counts.add_gated(step, gated, np.array([last[row] + 1 for row in range(ROWS)]))

    @invariant()
    def sums_agree(self) -> None:
        for key in (b"a", b"b", b"c"):
            own = [one for one in self.all if one.key == key]
            found = self.counts.of(key)
            assert (found is None) == (not own)
            if found:
                tokens, left_out = found
                want = Counter(one for each in own for out in each.ran.values() for one in out)
                assert tokens == sum(len(each.ran) for each in own)
                assert left_out.tolist() == [want[sub_layer] for sub_layer in range(2 * LAYERS)]


TestCountsFollowSequences = CountsFollowSequences.TestCase
TestCountsFollowSequences.settings = settings(max_examples=60, stateful_step_count=30)
