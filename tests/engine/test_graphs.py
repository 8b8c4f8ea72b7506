# SPDX-License-Identifier: Apache-2.0
"""Which steps may replay a CUDA graph, in arrays: no vLLM, no GPU."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_adaskip.classifiers import DecoderShape, SkipPlan
from vllm_adaskip.engine.graphs import SIZES, GraphBook
from vllm_adaskip.engine.request import MOST_PLANS, EngineFacts, Planner
from vllm_adaskip.engine.step import NOBODY, Ints

LAYERS = 4
DENSE, ONE, OTHER = SkipPlan(LAYERS), SkipPlan.parse([2], LAYERS), SkipPlan.parse([1], LAYERS)
BOOK = GraphBook([ONE], LAYERS, 12)
SHAPE = DecoderShape(LAYERS, 1, 2)

rows = st.lists(
    st.tuples(st.sampled_from([DENSE, ONE, OTHER]), st.integers(1, 9), st.integers(1, 3)),
    min_size=1,
    max_size=16,
)


def asked(plans: list[SkipPlan], prompts: list[int], queries: list[int], past: list[int]) -> tuple:
    """What `GraphBook.entry` takes, of rows that have so many tokens past their prompts."""
    ends: Ints = np.cumsum(queries)
    skips = np.stack([plan.mask() for plan in plans])
    return skips, ends, np.array(prompts) + np.array(past), np.array(prompts)


@given(rows, st.booleans(), st.booleans())
def test_a_graph_holds_rows_that_all_decode_one_token_under_one_plan_that_is_known(
    rows: list[tuple[SkipPlan, int, int]], same: bool, decodes: bool
) -> None:
    plans = [rows[0][0] if same else plan for plan, _, _ in rows]
    queries = [1 if decodes else query for _, _, query in rows]
    past = [1 if decodes else query - 1 for query in queries]  # some still read their prompts
    entry = BOOK.entry(*asked(plans, [one[1] for one in rows], queries, past))
    may = len({*plans}) == 1 and plans[0] != OTHER and len(rows) <= 12
    may &= all(query == 1 for query in queries) and all(past)
    assert (entry is not None) == may
    if entry is not None:
        assert entry.plan == plans[0] and entry.size >= len(rows)
        assert not any(len(rows) <= size < entry.size for size in BOOK.sizes)


def test_an_empty_batch_has_no_graph() -> None:
    none = np.zeros(0, dtype=np.int64)
    assert BOOK.entry(np.zeros((0, 2 * LAYERS), dtype=bool), none, none, none) is None


def test_dense_comes_first_and_once() -> None:
    assert GraphBook([ONE, DENSE, ONE], LAYERS, 8).plans == [DENSE, ONE]


@pytest.mark.parametrize(("most", "last"), [(1, 1), (5, 5), (256, 256), (1000, 256)])
def test_sizes_end_with_the_largest_batch_or_ours(most: int, last: int) -> None:
    sizes = GraphBook([], LAYERS, most).sizes
    assert sizes == sorted({*sizes}) and sizes[-1] == last and {*sizes} - {most} <= {*SIZES}


@pytest.mark.parametrize("size", [1, 6])
def test_the_step_of_a_graph_runs_no_sub_layer_for_a_part_of_its_rows(size: int) -> None:
    entry = BOOK.entry(*asked([ONE] * size, [3] * size, [1] * size, [2] * size))
    assert entry is not None
    step = BOOK.step(entry)
    assert step.num_tokens == step.num_generated == entry.size
    parts = [step.part(sub_layer) for sub_layer in range(2 * LAYERS)]
    assert parts == [NOBODY if left_out else None for left_out in ONE.mask()]


def test_graphs_are_for_the_methods_own_plan_and_those_that_are_named() -> None:
    facts = EngineFacts(SHAPE, "static", {"skip": [2]}, known_plans=[[1], [], [2]])
    assert Planner(facts).known_plans == [ONE, OTHER]


def test_more_plans_than_graphs_are_made_for_are_refused_by_name() -> None:
    many = [[0], [1], [2], [3], [0, 1], [0, 2], [0, 3], [1, 2]]
    with pytest.raises(ValueError, match=f"known_plans: 8 plans; allowed: {MOST_PLANS} with dense"):
        Planner(EngineFacts(SHAPE, known_plans=many))
    with pytest.raises(ValueError, match="layers 0 to 3"):
        Planner(EngineFacts(SHAPE, known_plans=[[4]]))
