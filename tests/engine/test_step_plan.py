# SPDX-License-Identifier: Apache-2.0
"""The step plan against its meaning, token by token."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vllm_adaskip.engine.kv_copies import Copies
from vllm_adaskip.engine.layout import Layout
from vllm_adaskip.engine.scaling import Scaling
from vllm_adaskip.engine.step_plan import Passing, Segment, StepPlan

LAYERS = 3

Row = tuple[int, int, int, list[bool]]
#: (computed, query, prompt length, left-out sub-layers)
rows = st.tuples(
    st.integers(0, 6),
    st.integers(1, 5),
    st.integers(1, 9),
    st.lists(st.booleans(), min_size=2 * LAYERS, max_size=2 * LAYERS),
)


#: Few values, so that runs of sub-layers without a factor, and products that are 1, do occur.
scales = st.lists(st.sampled_from([0.5, 1.0, 1.25, 2.0]), min_size=6, max_size=6)
FloatArray = NDArray[np.float32]


def plan_of(
    batch: list[Row], *, with_passing: bool = False, factors: FloatArray | None = None
) -> tuple[StepPlan, Layout]:
    computed, query, prompts = (np.array([row[i] for row in batch]) for i in range(3))
    starts = np.concatenate(([0], np.cumsum(query)))
    layout = Layout.of(starts, computed + query, prompts)
    skips = np.array([row[3] for row in batch])
    return StepPlan.build(skips, layout, with_passing=with_passing, factors=factors), layout


def expected_tokens(batch: list[Row], sub_layer: int) -> list[int]:
    """Positions in the step of the prompt tokens, and of tokens of rows that keep it."""
    tokens, position = [], 0
    for computed, query, prompt, skips in batch:
        for offset in range(query):
            if computed + offset < prompt or not skips[sub_layer]:
                tokens.append(position)
            position += 1
    return tokens


@settings(deadline=None)
@given(st.lists(rows, min_size=1, max_size=8))
def test_each_sub_layer_gets_exactly_its_tokens_in_order(batch: list[Row]) -> None:
    plan, _ = plan_of(batch)
    total = sum(row[1] for row in batch)
    ran: dict[int, list[int]] = {}
    order = []
    for segment in plan.pieces:
        everything = torch.arange(total)
        tokens = everything if segment.subset is None else everything[segment.subset.tokens]
        for sub_layer in segment.sub_layers:
            ran[sub_layer] = tokens.tolist()
            order.append(sub_layer)
    assert order == sorted(order)
    for sub_layer in range(2 * LAYERS):
        assert ran.get(sub_layer, []) == expected_tokens(batch, sub_layer)


@settings(deadline=None)
@given(st.lists(rows, min_size=1, max_size=8))
def test_a_subset_describes_the_sub_batch(batch: list[Row]) -> None:
    plan, layout = plan_of(batch)
    for segment in plan.pieces:
        if (subset := segment.subset) is None:
            continue
        kept = layout.query_lens[subset.rows.numpy()] - subset.dropped.numpy()
        assert np.array_equal(np.diff(subset.query_start_loc.numpy()), kept)
        assert (kept > 0).all() and subset.max_query_len == kept.max()
        assert subset.num_tokens == kept.sum()
        assert torch.arange(int(layout.query_lens.sum()))[subset.tokens].numel() == kept.sum()


@settings(deadline=None)
@given(st.lists(rows, min_size=1, max_size=8))
def test_counts_generated_tokens_that_run(batch: list[Row]) -> None:
    plan, _ = plan_of(batch)
    for sub_layer in range(2 * LAYERS):
        want = sum(
            computed + offset >= prompt and not skips[sub_layer]
            for computed, query, prompt, skips in batch
            for offset in range(query)
        )
        assert plan.generated_run[sub_layer] == want


@settings(deadline=None)
@given(st.lists(rows, min_size=1, max_size=8))
def test_who_passes_by_an_attention_is_met_between_what_it_runs(batch: list[Row]) -> None:
    """Each token, at each attention it leaves out, once, after all it ran below, before above."""
    plan, _ = plan_of(batch, with_passing=True)
    total = sum(row[1] for row in batch)
    everything = torch.arange(total)
    met: dict[int, list[int]] = {}
    last = [-1] * total  # the sub-layer each token went through or passed by last
    for piece in plan.pieces:
        if isinstance(piece, Passing):
            for token in everything[piece.tokens].tolist():
                assert last[token] < 2 * piece.layer
                last[token] = 2 * piece.layer
                met.setdefault(piece.layer, []).append(token)
            continue
        tokens = everything if piece.subset is None else everything[piece.subset.tokens]
        for token in tokens.tolist():
            assert last[token] < piece.sub_layers[0]
            last[token] = piece.sub_layers[-1]
    for layer in range(LAYERS):
        ran = set(expected_tokens(batch, 2 * layer))
        assert met.get(layer, []) == [token for token in range(total) if token not in ran]


@settings(deadline=None)
@given(st.lists(rows, min_size=1, max_size=8))
def test_copies_come_from_the_nearest_attention_that_ran(batch: list[Row]) -> None:
    plan, layout = plan_of(batch)
    copies = Copies.build(plan, np.array([row[3] for row in batch]), layout)
    row_of = [index for index, row in enumerate(batch) for _ in range(row[1])]
    want = set()
    for token, row in enumerate(row_of):
        ran = [layer for layer in range(LAYERS) if not batch[row][3][2 * layer]]
        for layer in range(LAYERS):
            if ran and token not in expected_tokens(batch, 2 * layer):
                below = [one for one in ran if one < layer]
                want.add((below[-1] if below else ran[0], token, layer))
    got, start = set(), 0
    for source, places in copies.sources.items() if copies else ():
        went_through = expected_tokens(batch, 2 * source)
        for index, place in enumerate(places.tolist(), start):
            assert copies is not None
            token = int(copies.tokens[index])
            assert went_through[place] == token  # the row of this very token
            got.add((source, token, int(copies.layers[index])))
        start += len(places)
    assert got == want


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(rows, scales), min_size=1, max_size=4), st.booleans())
def test_each_token_is_scaled_by_what_it_left_out_before_anything_looks_at_it(
    batch: list[tuple[Row, list[float]]], with_passing: bool
) -> None:
    """What every sub-layer sees of every token's stream, and what is left of it at the end."""
    factors = np.array([own for _, own in batch], np.float32)
    tokens = [row for row, _ in batch]
    plan, _ = plan_of(tokens, with_passing=with_passing, factors=factors)
    row_of = [index for index, row in enumerate(tokens) for _ in range(row[1])]
    everything = torch.arange(len(row_of))
    scale = torch.ones(len(row_of))
    left_out = [[s for s in range(6) if t not in expected_tokens(tokens, s)] for t in everything]

    def check(chosen: torch.Tensor, sub_layer: int) -> None:
        for token in chosen.tolist():
            before = [one for one in left_out[token] if one < sub_layer]
            assert scale[token] == factors[row_of[token], before].prod()  # exact: short binaries

    for piece in plan.pieces:
        if isinstance(piece, Scaling):
            assert len(everything[piece.tokens]) == len(piece.factors)
            assert (piece.factors != 1).all()
            scale[piece.tokens] *= piece.factors[:, 0]
        elif isinstance(piece, Passing):
            check(everything[piece.tokens], 2 * piece.layer)
        else:
            subset = piece.subset
            chosen = everything if subset is None else everything[subset.tokens]
            for sub_layer in piece.sub_layers:
                check(chosen, sub_layer)
    check(everything, 6)


@settings(deadline=None)
@given(st.lists(st.tuples(rows, scales), min_size=2, max_size=8), st.booleans())
def test_a_token_s_factors_do_not_depend_on_its_neighbours(
    batch: list[tuple[Row, list[float]]], with_passing: bool
) -> None:
    """Also not how they are multiplied together, which rounding would show."""

    def of_row(batch: list[tuple[Row, list[float]]], row: int) -> list[list[float]]:
        factors = np.array([own for _, own in batch], np.float32)
        tokens = [one for one, _ in batch]
        plan, _ = plan_of(tokens, with_passing=with_passing, factors=factors)
        start = sum(one[1] for one in tokens[:row])
        end = start + tokens[row][1]
        steps: list[list[float]] = []
        for piece in plan.pieces:
            if isinstance(piece, Scaling):
                each = torch.ones(sum(one[1] for one in tokens))
                each[piece.tokens] = piece.factors[:, 0]
                if (each[start:end] != 1).any():
                    steps.append(each[start:end].tolist())
        return steps

    assert of_row(batch, 1) == of_row(batch[1:2], 0)


@settings(deadline=None)
@given(st.lists(rows, min_size=1, max_size=8), st.booleans())
def test_factors_of_one_change_no_step_plan(batch: list[Row], with_passing: bool) -> None:
    ones = np.ones((len(batch), 2 * LAYERS), np.float32)
    plain, _ = plan_of(batch, with_passing=with_passing)
    scaled, _ = plan_of(batch, with_passing=with_passing, factors=ones)
    assert list(map(described, plain.pieces)) == list(map(described, scaled.pieces))


def described(piece: object) -> str:
    """Say what a piece holds: its tensors, not which they are."""
    if isinstance(piece, Segment):
        return f"{piece.sub_layers} {piece.subset and piece.subset.tokens}"
    return repr(piece)


def test_sub_layers_in_a_row_are_scaled_at_once_and_split_no_others() -> None:
    row = [False, True, True, True, False, False]
    factors = np.array([[1, 2, 3, 4, 1, 1], [9] * 6], np.float32)
    plan, _ = plan_of([(5, 1, 2, row), (5, 1, 2, [False] * 6)], factors=factors)
    scalings = [piece for piece in plan.pieces if isinstance(piece, Scaling)]
    assert [one.factors.tolist() for one in scalings] == [[[24.0]]]
    assert [one.tokens for one in scalings] == [slice(0, 1)]
    assert len(plan.pieces) == 4  # 0 by both; 1 to 3 by one; scaled; 4 and 5 by both
    alone, _ = plan_of([(5, 1, 2, [False, True, False, False, False, False])], factors=factors[:1])
    kinds = [type(piece).__name__ for piece in alone.pieces]
    assert kinds == ["Segment", "Scaling", "Segment"]  # though the same tokens run both


def test_a_sub_layer_that_nobody_needs_is_in_no_segment() -> None:
    skips = [False, False, True, True, False, True]
    plan, _ = plan_of([(9, 1, 4, skips), (7, 1, 2, skips)])
    assert [segment.sub_layers for segment in plan.pieces] == [(0, 1, 4)]
    assert plan.pieces[0].subset is None


def test_prompts_run_dense_whatever_their_plan() -> None:
    plan, _ = plan_of([(0, 5, 5, [True] * 5 + [False]), (2, 1, 9, [True] * 5 + [False])])
    assert plan.is_dense


def test_neighbours_in_the_batch_are_a_slice_and_others_a_gather() -> None:
    keep, leave = [False] * 6, [True, True] + [False] * 4
    together, _ = plan_of([(5, 1, 2, leave), (5, 1, 2, keep), (5, 1, 2, keep)])
    apart, _ = plan_of([(5, 1, 2, keep), (5, 1, 2, leave), (5, 1, 2, keep)])
    assert together.pieces[0].subset is not None and apart.pieces[0].subset is not None
    assert together.pieces[0].subset.tokens == slice(1, 3)
    assert isinstance(apart.pieces[0].subset.tokens, torch.Tensor)


def test_sub_layers_with_the_same_tokens_share_one_subset() -> None:
    one, two = [True, False] * 3, [False] * 6
    plan, _ = plan_of([(5, 1, 2, one), (5, 1, 2, two)])
    subsets = [segment.subset for segment in plan.pieces if segment.subset]
    assert len(subsets) == 3 and len({id(subset) for subset in subsets}) == 1
