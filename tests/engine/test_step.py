# SPDX-License-Identifier: Apache-2.0
"""A step against its meaning, token by token."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_adaskip.engine.fill import Copies
from vllm_adaskip.engine.step import NOBODY, Step, Tokens

LAYERS = 3
SUB_LAYERS = range(2 * LAYERS)

Row = tuple[int, int, int, list[bool]]
#: (computed, query, prompt length, left-out sub-layers)
rows = st.tuples(
    st.integers(0, 6),
    st.integers(1, 5),
    st.integers(1, 9),
    st.lists(st.booleans(), min_size=2 * LAYERS, max_size=2 * LAYERS),
)
#: Rows that decode, as all do in most steps.
decoding = st.tuples(st.integers(1, 6), st.just(1), st.just(1), rows.map(lambda row: row[3]))
batches = st.one_of(*(st.lists(row, min_size=1, max_size=8) for row in (rows, decoding)))
#: Of each token of a step: a seed for whether, and what, it leaves out in the middle.
cuts = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 2 * LAYERS - 2)), max_size=2)


def step_of(batch: list[Row], prompts: list[list[bool]] | None = None) -> Step:
    computed, query, prompt_lens = (np.array([row[i] for row in batch]) for i in range(3))
    starts = np.concatenate(([0], np.cumsum(query)))
    skips = np.array([row[3] for row in batch])
    own = None if prompts is None else np.array(prompts)
    return Step.of(starts, computed + query, prompt_lens, skips, own)


def tokens_of(batch: list[Row]) -> list[tuple[int, int, bool]]:
    """Of each token of the step: its row, its position in the sequence, whether it is generated."""
    return [
        (row, computed + offset, computed + offset >= prompt)
        for row, (computed, query, prompt, _) in enumerate(batch)
        for offset in range(query)
    ]


def expected(batch: list[Row]) -> np.ndarray:
    """``[tokens, sub_layers]``, what each token runs by its plan."""
    return np.array([
        [not (generated and batch[row][3][sub_layer]) for sub_layer in SUB_LAYERS]
        for row, _, generated in tokens_of(batch)
    ])  # fmt: skip


def left(batch: list[Row], changes: list[tuple[int, int]]) -> tuple[Step, np.ndarray]:
    """A step some tokens of which leave out sub-layers above some, and what each token runs."""
    step, runs = step_of(batch), expected(batch)
    for seed, after in changes:
        # All is read before, so that what is kept of it would show afterwards.
        read = [step.part(sub_layer) for sub_layer in SUB_LAYERS]
        assert len(read) == len(step.counted)
        draw = np.random.default_rng(seed)
        leaving = np.flatnonzero(draw.random(len(runs)) < 0.5)
        left_out = draw.random((len(leaving), 2 * LAYERS)) < draw.choice([0.3, 1.0])
        left_out[:, : after + 1] = False
        step.leave(leaving, left_out)
        runs[leaving] &= ~left_out
    return step, runs


def positions(step: Step, sub_layer: int) -> list[int]:
    part = step.part(sub_layer)
    return list(range(step.num_tokens)) if part is None else part.positions.tolist()


@given(batches, cuts)
def test_each_sub_layer_gets_exactly_its_tokens_in_order(
    batch: list[Row], changes: list[tuple[int, int]]
) -> None:
    step, runs = left(batch, changes)
    for sub_layer in SUB_LAYERS:
        want = np.flatnonzero(runs[:, sub_layer]).tolist()
        assert positions(step, sub_layer) == want
        assert (step.part(sub_layer) is None) == (len(want) == len(runs))
        assert (step.part(sub_layer) is NOBODY) == (not want)
        for other in SUB_LAYERS[:sub_layer]:  # one object for the same tokens, also after a cut
            same = (runs[:, other] == runs[:, sub_layer]).all()
            assert (step.part(other) is step.part(sub_layer)) == same
    assert step.is_dense == bool(runs.all())


@given(batches, cuts)
def test_each_entry_is_a_run_of_one_sequence_and_ends_where_it_is_said_to(
    batch: list[Row], changes: list[tuple[int, int]]
) -> None:
    step, _ = left(batch, changes)
    tokens = tokens_of(batch)
    for sub_layer in SUB_LAYERS:
        if (part := step.part(sub_layer)) in (None, NOBODY):
            continue
        assert part is not None
        bounds = part.starts.tolist()
        assert bounds[0] == 0 and bounds[-1] == part.count
        assert part.longest == max(np.diff(bounds))
        entries = []
        for row, behind, first, last in zip(
            part.rows.tolist(), part.behind.tolist(), bounds, bounds[1:], strict=False
        ):
            own = [tokens[token] for token in part.positions[first:last].tolist()]
            computed, query, *_ = batch[row]
            end = computed + query - behind
            assert own and {each[0] for each in own} == {row}
            assert [each[1] for each in own] == list(range(end - len(own), end))
            entries.append((row, end))
        starts = {(tokens[token][0], tokens[token][1]) for token in part.positions[bounds[:-1]]}
        assert starts.isdisjoint(entries)  # entries that touch are one


@given(batches, cuts)
def test_counts_generated_tokens_that_run_and_who_passes_by(
    batch: list[Row], changes: list[tuple[int, int]]
) -> None:
    step, runs = left(batch, changes)
    generated = np.array([each[2] for each in tokens_of(batch)])
    assert step.num_tokens == len(runs) and step.num_generated == generated.sum()
    assert (step.counted == runs[generated].sum(axis=0)).all()
    for sub_layer in SUB_LAYERS:
        want = np.flatnonzero(generated & ~runs[:, sub_layer])
        assert step.passing(sub_layer).positions.tolist() == want.tolist()


@given(batches, cuts)
def test_copies_come_from_the_nearest_attention_that_ran(
    batch: list[Row], changes: list[tuple[int, int]]
) -> None:
    step, runs = left(batch, changes)
    generated = [token for token, each in enumerate(tokens_of(batch)) if each[2]]
    want = set()
    for token in generated:
        ran = [layer for layer in range(LAYERS) if runs[token, 2 * layer]]
        for layer in range(LAYERS):
            if ran and layer not in ran:
                below = [one for one in ran if one < layer]
                want.add((below[-1] if below else ran[0], token, layer))
    chosen = np.array(generated, dtype=np.int64)
    ran_of = runs[chosen][:, 0::2]
    copies = Copies.of(step, chosen, ~ran_of, ran_of, torch.device("cpu"))
    kept = [
        (source, token)
        for source in copies.sources
        for token in generated
        if runs[token, 2 * source]
    ]
    got = set()
    for row, layer, token in zip(
        copies.rows.tolist(), copies.layers.tolist(), copies.tokens.tolist(), strict=True
    ):
        source, own = kept[row]
        assert own == token  # the row of this very token
        got.add((source, token, layer))
    assert got == want


@given(st.lists(st.tuples(rows, rows), min_size=1, max_size=6))
def test_prompt_tokens_may_have_a_plan_of_their_own(both: list[tuple[Row, Row]]) -> None:
    batch = [row for row, _ in both]
    own = [other[3] for _, other in both]
    step, runs = step_of(batch, own), expected(batch)
    for token, (row, _, generated) in enumerate(tokens_of(batch)):
        if not generated:
            runs[token] &= ~np.array(own[row])
    for sub_layer in SUB_LAYERS:
        assert positions(step, sub_layer) == np.flatnonzero(runs[:, sub_layer]).tolist()


@given(batches, cuts)
def test_knows_where_prompts_end(batch: list[Row], changes: list[tuple[int, int]]) -> None:
    computed, query, prompt_lens = (np.array([row[i] for row in batch]) for i in range(3))
    step, _ = left(batch, changes)
    found_rows, ends = step.prompt_ends(computed + query, prompt_lens)
    want = [
        (row, token)
        for token, (row, position, _) in enumerate(tokens_of(batch))
        if position == batch[row][2] - 1
    ]
    assert list(zip(found_rows.tolist(), ends.tolist(), strict=True)) == want


@given(batches, st.integers(0, 10_000))
def test_a_fork_leaves_its_original_as_it_was(batch: list[Row], seed: int) -> None:
    step = step_of(batch)
    before = [positions(step, sub_layer) for sub_layer in SUB_LAYERS]
    runs, counted = step.runs.copy(), step.counted.copy()
    fork = step.fork()
    leaving = np.flatnonzero(np.random.default_rng(seed).random(step.num_tokens) < 0.5)
    fork.leave(leaving, np.ones((len(leaving), 2 * LAYERS), dtype=bool))
    assert [positions(step, sub_layer) for sub_layer in SUB_LAYERS] == before
    # Parts and counts may be kept from before; what they are made from must be as it was too.
    assert (step.runs == runs).all() and (step.counted == counted).all()
    for sub_layer in SUB_LAYERS:
        assert set(positions(fork, sub_layer)) == set(before[sub_layer]) - set(leaving.tolist())


def test_prompts_run_dense_whatever_their_plan() -> None:
    assert step_of([(0, 5, 5, [True] * 5 + [False]), (2, 1, 9, [True] * 5 + [False])]).is_dense


def test_neighbours_in_the_batch_are_a_slice_and_others_a_gather() -> None:
    keep, leave = [False] * 6, [True, True] + [False] * 4
    together = step_of([(5, 1, 2, leave), (5, 1, 2, keep), (5, 1, 2, keep)]).part(0)
    apart = step_of([(5, 1, 2, keep), (5, 1, 2, leave), (5, 1, 2, keep)]).part(0)
    assert together is not None and apart is not None
    assert together.on(torch.device("cpu")) == slice(1, 3)
    assert isinstance(apart.on(torch.device("cpu")), torch.Tensor)


def test_sub_layers_with_the_same_tokens_share_one_part() -> None:
    step = step_of([(5, 1, 2, [True, False] * 3), (5, 1, 2, [False] * 6)])
    assert step.part(0) is step.part(2) is step.part(4) is not None
    assert step.part(1) is None
    # A gate that clears one sub-layer leaves the parts of the others as they are.
    fork = step.fork()
    fork.leave(np.array([1]), np.eye(2 * LAYERS, dtype=bool)[[3]])
    assert fork.part(4) is step.part(4) and fork.part(3) is not None


def test_places_of_tokens_among_others() -> None:
    others = Tokens(np.array([1, 4, 6, 7]))
    assert Tokens(np.array([4, 7])).places(others).positions.tolist() == [1, 3]
    assert Tokens(np.array([4, 7])).places(None).positions.tolist() == [4, 7]
    assert Tokens(np.array([], dtype=np.int64)).places(others).count == 0
