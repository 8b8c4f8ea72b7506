# SPDX-License-Identifier: Apache-2.0
"""Which plans sequences of a batch are given when they may share (`engine/coalesce.py`)."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_adaskip import DecoderShape, SkipPlan
from vllm_adaskip.classifiers import PromptStatistics
from vllm_adaskip.engine.coalesce import PART, ROW, BoolArray, drawn, within_reach
from vllm_adaskip.engine.decide import SkipState
from vllm_adaskip.engine.request import EngineFacts, Planner

SHAPE = DecoderShape(6, attention_parameters=1, mlp_parameters=2)
SUB_LAYERS = 12
WEIGHTS = np.tile([1, 2], 6)
BUDGET = 0.7

rows_of_bools = st.lists(
    st.lists(st.booleans(), min_size=SUB_LAYERS, max_size=SUB_LAYERS), max_size=5
)


@st.composite
def cases(draw: Any) -> tuple[BoolArray, np.ndarray[Any, Any], BoolArray, BoolArray]:
    """``allowed``, ``regrets``, ``left_out`` and ``live``; every plan once."""
    masks = draw(rows_of_bools.filter(bool))
    left_out = np.unique(np.array(masks, dtype=np.bool_), axis=0)
    live = np.array(draw(rows_of_bools), dtype=np.bool_).reshape(-1, SUB_LAYERS)
    allowed = np.array(
        draw(
            st.lists(
                st.lists(st.booleans(), min_size=len(left_out), max_size=len(left_out)),
                min_size=1,
                max_size=6,
            )
        )
    )
    own = [draw(st.integers(0, len(left_out) - 1)) for _ in allowed]
    allowed[range(len(own)), own] = True
    regrets = np.array(
        [[draw(st.sampled_from([0.0, 0.2, 0.5, 1.0])) for _ in left_out] for _ in allowed]
    )
    return allowed, regrets, left_out, live


def added_work(left_out: BoolArray, live: BoolArray) -> float:
    """What one more sequence adds to a batch, sub-layer by sub-layer, as plainly as can be."""
    work = 0.0
    for sub_layer, weight in enumerate(WEIGHTS):
        running = [not row[sub_layer] for row in live]
        if not left_out[sub_layer]:
            work += ROW * weight + (0 if any(running) else weight)
        elif running and all(running):
            work += PART * weight
    return work


@given(cases())
def test_everybody_gets_a_plan_that_they_allow(case: Any) -> None:
    allowed, *_ = case
    assert all(row[plan] for row, plan in zip(allowed, drawn(*case, WEIGHTS), strict=True))


@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_sequences_and_rows_does_not_matter(case: Any, random: Any) -> None:
    allowed, regrets, left_out, live = case
    order = random.sample(range(len(allowed)), len(allowed))
    rows = random.sample(range(len(live)), len(live))
    again = drawn(allowed[order], regrets[order], left_out, live[rows], WEIGHTS)
    want = drawn(*case, WEIGHTS)
    assert again == [want[index] for index in order]


@given(cases())
def test_a_sequence_alone_gets_what_adds_least(case: Any) -> None:
    """By brute force, of equals the smaller regret, then the first."""
    allowed, regrets, left_out, live = (case[0][:1], case[1][:1], *case[2:])
    keys = [
        (added_work(left_out[plan], live), regrets[0][plan], plan)
        for plan in np.flatnonzero(allowed[0])
    ]
    assert drawn(allowed, regrets, left_out, live, WEIGHTS) == [min(keys)[2]]


@given(cases())
def test_who_may_follow_any_plan_follow_one(case: Any) -> None:
    allowed, *rest = case
    assert len({*drawn(np.ones_like(allowed), *rest, WEIGHTS)}) == 1


@given(cases())
def test_who_allows_the_one_plan_that_the_batch_follows_adds_no_weights(case: Any) -> None:
    allowed, regrets, left_out, _ = case
    live = np.repeat(left_out[:1], 3, axis=0)
    allowed[:, 0] = True
    for plan in drawn(allowed, regrets, left_out, live, WEIGHTS):
        assert not (~left_out[plan] & left_out[0]).any()


def test_what_most_allow_goes_first() -> None:
    """Of one size, three sequences have one in common, and two of them another."""
    left_out = np.array([SkipPlan.parse([layer], 6).mask() for layer in range(5)])
    own_and_shared = [[1, 0, 0, 1, 0], [0, 1, 0, 1, 1], [0, 0, 1, 1, 1]]
    allowed = np.array(own_and_shared, dtype=np.bool_)
    nobody = np.zeros((0, SUB_LAYERS), dtype=np.bool_)
    assert drawn(allowed, np.zeros((3, 5)), left_out, nobody, WEIGHTS) == [3, 3, 3]


def running(*plans: list[int]) -> BoolArray:
    """``[plans, SUB_LAYERS]`` for the sub-layers that each runs."""
    left_out = np.ones((len(plans), SUB_LAYERS), dtype=np.bool_)
    for row, sub_layers in zip(left_out, plans, strict=True):
        row[sub_layers] = False
    return left_out


ALIKE = np.ones(SUB_LAYERS, dtype=np.int64)
NOBODY = np.zeros((0, SUB_LAYERS), dtype=np.bool_)


def test_what_was_drawn_before_is_read_anyway() -> None:
    """The second sequence runs more than it might, of which the first runs most."""
    left_out = running([*range(6)], [*range(5, 12)], [*range(1, 9)])
    allowed = np.array([[1, 0, 0], [0, 1, 1]], dtype=np.bool_)
    assert drawn(allowed, np.zeros((2, 3)), left_out, NOBODY, ALIKE) == [0, 2]
    assert drawn(allowed[1:], np.zeros((1, 3)), left_out, NOBODY, ALIKE) == [1]


def test_rows_that_go_together_are_not_parted_for_little() -> None:
    """Both other plans add one sub-layer; the shorter leaves three out that all others run."""
    left_out = running([*range(6)], [0, 1, 2, 3, 4, 7], [0, 1, 2, 7])
    allowed = np.array([[1, 0, 0]] * 3 + [[0, 1, 1]], dtype=np.bool_)
    assert drawn(allowed, np.zeros((4, 3)), left_out, NOBODY, ALIKE) == [0, 0, 0, 1]
    assert drawn(allowed[3:], np.zeros((1, 3)), left_out, left_out[:1], ALIKE) == [1]
    assert drawn(allowed[3:], np.zeros((1, 3)), left_out, NOBODY, ALIKE) == [2]


def test_of_equals_the_smaller_regret_of_who_regrets_most_then_the_first() -> None:
    left_out = running([0, 1], [2, 3], [4, 5], [6, 7])
    allowed = np.ones((2, 4), dtype=np.bool_)
    regrets = np.array([[0.0, 0.3, 0.3, 0.3], [0.4, 0.3, 0.2, 0.0]])
    assert drawn(allowed, regrets, left_out, NOBODY, ALIKE) == [1, 1]


def test_a_plan_that_is_read_anyway_goes_before_one_that_more_allow() -> None:
    left_out = np.array([SkipPlan.parse([layer], 6).mask() for layer in range(3)])
    live = np.repeat(left_out[:1], 2, axis=0)
    allowed = np.array([[1, 1, 0], [1, 1, 0], [0, 1, 0]], dtype=np.bool_)
    assert drawn(allowed, np.zeros((3, 3)), left_out, live, WEIGHTS) == [0, 0, 1]


def test_within_reach_is_the_budget_and_a_layer_more_or_a_sub_layer_less() -> None:
    names = ([], [1], [1, 2], ["mlp:1", "mlp:2", "mlp:3"], [1, 2, "mlp:3"], [1, 2, 3])
    shares = np.array([SkipPlan.parse(one, 6).share(SHAPE) for one in names])
    near = within_reach(shares, shares[2], 1.0, SHAPE)
    assert near.tolist() == [False, True, True, True, True, False]
    near = within_reach(shares, shares[2], 0.7, SHAPE)
    assert near.tolist() == [False, False, True, True, True, False]


def state_of(coalesce: float, **options: Any) -> SkipState:
    facts = EngineFacts(SHAPE, "adaskip", options, BUDGET, coalesce_regret=coalesce)
    return SkipState(Planner(facts), 32)


def statistics(seed: int, width: int, decimals: int) -> PromptStatistics:
    values = np.random.default_rng(seed).uniform(0.8, 1.0, width).round(decimals)
    return PromptStatistics(3, values, values)


def enter_and_decide(
    state: SkipState, seeds: range, decimals: int = 9
) -> dict[int, PromptStatistics]:
    """Put prompts into the rows of their numbers and let their plans be decided in one step.

    With few decimals plans are often as good as others.
    """
    read = {seed: statistics(seed, state.planner.classifier.width, decimals) for seed in seeds}
    for seed in seeds:
        state.enter(seed, None, [seed], generated=0)
    state.decide(read)
    return read


def test_at_0_every_sequence_has_the_plan_of_its_prompt_whoever_is_there() -> None:
    state = state_of(0.0)
    state.enter(31, {"adaskip_skip": [2, 3]}, [0], generated=0)
    read = enter_and_decide(state, range(8))
    for row, prompt in read.items():
        own = state.planner.classifier.decide(BUDGET, prompt)
        assert (state.table.skips[row] == own.mask()).all()
    assert state.table.live_plans > 4 and state.coalesced == 0


def test_at_1_one_plan_for_all_also_for_those_that_come_later() -> None:
    state = state_of(1.0)
    enter_and_decide(state, range(8))
    first = state.table.skips[0].copy()
    enter_and_decide(state, range(8, 20))
    assert (state.table.skips[:20] == first).all()
    assert state.table.live_plans == 1 and state.coalesced >= 16
    assert SkipPlan.of_mask(first).share(SHAPE) <= BUDGET


def test_the_more_is_allowed_the_fewer_weights_are_read() -> None:
    read = []
    for coalesce in (0.0, 0.2, 0.5, 1.0):
        state = state_of(coalesce)
        enter_and_decide(state, range(16))
        read.append(int(WEIGHTS @ (~state.table.followed).any(axis=0)))
    assert read == sorted(read, reverse=True) and read[-1] < 0.75 * read[0]


def test_regret_stays_within_what_is_allowed() -> None:
    state = state_of(0.15)
    read = enter_and_decide(state, range(16))
    method, regrets = state.planner.classifier, []
    for row, prompt in read.items():
        own = method.decide(BUDGET, prompt)
        followed = state.table.skips[row]
        assert SkipPlan.of_mask(followed).share(SHAPE) <= BUDGET
        regrets.append(method.regrets(own, followed[None], prompt)[0])
    assert 0 < max(regrets) <= 0.15 and state.coalesced > 0


def test_a_plan_of_the_codebook_is_shared_that_is_nobody_s_own() -> None:
    """Each would take it before the other's own, whose layers it needs most."""
    options = {"threshold": 0.0, "codebook": [[4, 5]]}
    facts = EngineFacts(
        DecoderShape(10, 1, 2), "first", options, 0.8, profile=".", coalesce_regret=0.2
    )
    state = SkipState(Planner(facts), 2)
    needs = np.array([[1, 0.1, 0.1, 0.2, 0.25, 0.25, 0.2, 1, 1, 1],
                      [1, 1, 1, 0.2, 0.25, 0.25, 0.2, 0.1, 0.1, 1]])  # fmt: skip
    read = {row: PromptStatistics(3, scores, scores) for row, scores in enumerate(needs)}
    own = [state.planner.classifier.decide(0.8, one).entries() for one in read.values()]
    assert own == [[1, 2], [7, 8]]
    for row in read:
        state.enter(row, None, [row], generated=0)
    state.decide(read)
    assert [SkipPlan.of_mask(one).entries() for one in state.table.skips] == [[4, 5]] * 2


def test_a_sequence_whose_decision_failed_is_dense_whoever_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = state_of(1.0)
    method = state.planner.classifier
    decide, failing = method.decide, statistics(1, method.width, 9).mean

    def sometimes(budget: float, prompt: PromptStatistics) -> SkipPlan:
        if (prompt.mean == failing).all():
            raise ZeroDivisionError
        return decide(budget, prompt)

    monkeypatch.setattr(method, "decide", sometimes)
    enter_and_decide(state, range(4))
    skips = state.table.skips[:4]
    assert not skips[1].any() and skips[0].any() and (skips[[0, 2, 3]] == skips[0]).all()
    assert state.failures == 1
    state.enter(5, None, [1], generated=0)  # remembered
    assert state.failures == 2 and not state.table.skips[5].any()


def test_explicit_plans_and_dense_requests_are_not_changed_but_count() -> None:
    state = state_of(1.0)
    explicit = SkipPlan.parse([2, 3], 6)
    state.enter(30, {"adaskip_skip": [2, 3]}, [0], generated=0)
    enter_and_decide(state, range(4))
    assert (state.table.skips[:4] == explicit.mask()).all()
    state.enter(31, {"adaskip": "off"}, [0], generated=0)
    enter_and_decide(state, range(4, 8))
    assert (state.table.skips[4:8] == explicit.mask()).all()
    assert (state.table.skips[30] == explicit.mask()).all() and not state.table.skips[31].any()
    assert state.table.live_plans == 2


def test_a_plan_that_leaves_out_more_is_not_followed() -> None:
    """Though it would add nothing to what the batch runs."""
    state = state_of(1.0)
    state.enter(31, {"adaskip_skip": [1, 2, 3, 4]}, [0], generated=0)
    enter_and_decide(state, range(4))
    assert not (state.table.skips[:4] == state.table.skips[31]).all(axis=1).any()


def test_a_dense_request_draws_nobody_beyond_the_budget() -> None:
    """Its plan adds no weights, and where others regret much nobody regrets it."""
    state = state_of(0.01)
    state.enter(31, {"adaskip": "off"}, [0], generated=0)
    enter_and_decide(state, range(8))
    for followed in state.table.skips[:8]:
        assert SkipPlan.of_mask(followed).share(SHAPE) <= BUDGET


def test_a_plan_that_the_method_never_gives_is_nobody_else_s() -> None:
    """The first layer is never left out by the method, but may be by a request's own plan."""
    state = state_of(1.0)
    state.enter(31, {"adaskip_skip": [0, 3]}, [0], generated=0)
    enter_and_decide(state, range(8))
    assert not state.table.skips[:8, :2].any()


def test_who_comes_back_after_preemption_keeps_the_plan() -> None:
    """In another batch, in which it would be given another."""
    state = state_of(1.0)
    enter_and_decide(state, range(3))
    was = state.table.skips[0].copy()
    for row in range(3):
        state.table.remove(row)
    state.enter(31, {"adaskip_skip": [2, 3]}, [0], generated=0)
    assert (state.table.skips[31] != was).any()
    enter_and_decide(state, range(3, 5))
    assert (state.table.skips[3:5] == state.table.skips[31]).all()
    state.enter(0, None, [0], generated=7)
    assert (state.table.skips[0] == was).all() and 0 not in state.table.undecided


RANK = """
from test_coalesce import enter_and_decide, state_of
for coalesce, decimals in ((0.3, 9), (1.0, 1), (0.6, 1)):
    state = state_of(coalesce)
    state.enter(31, {"adaskip_skip": [0]}, [0], generated=0)
    for seeds in (range(9), range(9, 20)):
        enter_and_decide(state, seeds, decimals)
    print(state.table.skips.tolist(), state.coalesced)
"""


def test_ranks_decide_alike() -> None:
    """Each in its process, where Python hashes in another order."""
    printed = {
        subprocess.run(
            [sys.executable, "-c", RANK],
            env={
                **os.environ,
                "PYTHONHASHSEED": seed,
                "PYTHONPATH": ":".join((os.path.dirname(__file__), *sys.path)),
            },
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1 and len(printed.pop()) > 1000


@pytest.mark.parametrize("method", ["ffn-skip", "static", "none", "exit"])
def test_a_method_that_cannot_compare_plans_is_refused(method: str) -> None:
    options: dict[str, Any] = {"static": {"skip": [1]}, "exit": {"layers": 3}}.get(method, {})
    with pytest.raises(ValueError, match=r"coalesce_regret: 0\.5 .*allowed: 0, or method 'ad"):
        Planner(EngineFacts(SHAPE, method, options, coalesce_regret=0.5))
    Planner(EngineFacts(SHAPE, method, options))
