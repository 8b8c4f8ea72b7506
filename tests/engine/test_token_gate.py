# SPDX-License-Identifier: Apache-2.0
"""What a gate is told of a step, and who goes through after it, token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from vllm_adaskip import SkipPlan
from vllm_adaskip.classifiers import TokenGate
from vllm_adaskip.engine.layout import Layout
from vllm_adaskip.engine.step_plan import Segment, StepPlan
from vllm_adaskip.engine.table import SequenceTable
from vllm_adaskip.engine.token_gate import StepGate

LAYERS = 3
GATED = frozenset({3, 5})
#: (computed, query, prompt length, MLPs left out by the plan, gated)
rows = st.tuples(
    st.integers(0, 6),
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(0, (1 << LAYERS) - 1),
    st.booleans(),
)
Row = tuple[int, int, int, int, bool]


class EvenAges(TokenGate):
    """Closes one of its two sub-layers to tokens of even age; writes down what it is told."""

    sub_layers = GATED

    def begin(self, ages: NDArray[np.int64], planned: NDArray[np.int64]) -> bool:
        self.ages, self.planned = ages, planned
        return bool((ages >= 0).any())

    def closed(self, sub_layer: int) -> NDArray[np.bool_] | None:
        return None if sub_layer == 3 else (self.ages >= 0) & (self.ages % 2 == 0)

    def observe(self, sub_layer: int, before: Tensor, update: Tensor) -> None:
        raise AssertionError


def arranged(batch: list[Row]) -> tuple[EvenAges, StepGate, StepPlan]:
    table = SequenceTable(LAYERS, len(batch))
    for row, (_, _, prompt, mlps, gated) in enumerate(batch):
        table.add(row, SkipPlan(LAYERS, mlp=mlps), prompt, gated=gated)
    computed, query = (np.array([row[i] for row in batch]) for i in range(2))
    starts = np.concatenate(([0], np.cumsum(query)))
    layout = Layout.of(starts, computed + query, table.prompt_lens)
    told = EvenAges()
    gate = StepGate(told, table)
    plan = StepPlan.build(table.skips, layout, alone=gate.arrange(layout))
    gate.begin(computed + query)
    return told, gate, plan


def tokens_of(batch: list[Row]) -> list[tuple[int, Row]]:
    """``(age, row)`` of each token of the step; what is not gated has a negative age."""
    return [
        (computed + offset - prompt if gated else -1, row)
        for row in batch
        for computed, query, prompt, _, gated in [row]
        for offset in range(query)
    ]


def index(segment: Segment | None, total: int) -> list[int]:
    everything = torch.arange(total)
    if segment is None:
        return []
    return everything[segment.subset.tokens if segment.subset else slice(None)].tolist()


@settings(deadline=None)
@given(st.lists(rows, min_size=1, max_size=8))
def test_ages_and_who_goes_through(batch: list[Row]) -> None:
    told, gate, plan = arranged(batch)
    tokens = tokens_of(batch)
    assert bool(gate.guarded) == any(age >= 0 for age, _ in tokens)
    if not gate.guarded:
        return
    assert [max(age, -1) for age in told.ages.tolist()] == [max(age, -1) for age, _ in tokens]
    for (age, (_, _, _, mlps, _)), planned in zip(tokens, told.planned, strict=True):
        assert age < 0 or planned == (mlps >> 1 & 1) + (mlps >> 2 & 1)
    left_out = np.zeros(2 * LAYERS, dtype=int)
    met = set()
    for segment in plan.pieces:
        assert isinstance(segment, Segment)
        if GATED.isdisjoint(segment.sub_layers):
            continue
        (sub_layer,) = segment.sub_layers
        met.add(sub_layer)
        before = index(segment, len(tokens))
        closed = told.closed(sub_layer)
        want = [one for one in before if closed is None or not closed[one]]
        narrowed = gate.narrowed(segment)
        assert index(narrowed, len(tokens)) == want
        assert narrowed is None or bool(want)
        left_out[sub_layer] += len(before) - len(want)
    everybody = {sub_layer for sub_layer in GATED if plan.generated_run[sub_layer]}
    assert met >= everybody
    assert (gate.left_out == left_out).all()


def test_without_a_gate_or_gated_rows_nothing_stands_alone() -> None:
    batch: list[Row] = [(5, 1, 3, 0, False), (7, 1, 3, 0, False)]
    told, gate, plan = arranged(batch)
    assert not gate.guarded and not hasattr(told, "ages")
    assert [segment.sub_layers for segment in plan.pieces] == [tuple(range(2 * LAYERS))]


@pytest.mark.parametrize("pieces", [[(9, 1, 4, 0, True)], [(3, 2, 5, 0, True), (9, 1, 4, 0, True)]])
def test_a_dense_step_stays_dense_although_its_segments_are_cut(pieces: list[Any]) -> None:
    """So that stock vLLM's forward runs it as long as the gate is not active."""
    _, _, plan = arranged(pieces)
    assert len(plan.pieces) > 1 and plan.is_dense
