# SPDX-License-Identifier: Apache-2.0
"""Whether plans pay, from costs that are made up here: no engine, no clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vllm_adaskip.classifiers import DecoderShape
from vllm_adaskip.engine import guard as guarding
from vllm_adaskip.engine.blocks import block_mark, unfindable
from vllm_adaskip.engine.guard import AGAIN, DOUBT, STALE, Costs, Guard, measured, sort_of
from vllm_adaskip.engine.request import EngineFacts, Planner
from vllm_adaskip.engine.step import Bools

LAYERS = 4
#: Dense 40 ms at one row and 80 at 64; the loop 1 + 4 * (4 + 8) = 49 and 97.
TABLE = 1e-3 * np.array(
    [[40, 80], [1, 1], [4, 8], [8, 16], [0.5, 1], [0.25, 0.5], [10, 20]], dtype=np.float64
)
KNOWN = np.zeros(2 * LAYERS, dtype=bool)
KNOWN[2:8] = True


def costs() -> Costs:
    return Costs([1, 64], TABLE, [KNOWN])


def rows(*plans: set[int]) -> Bools:
    return np.array([[sub_layer in plan for sub_layer in range(2 * LAYERS)] for plan in plans])


def alone(count: int, *left_out: int) -> Bools:
    return rows(*[{*left_out}] * count)


def test_costs_of_steps_that_run_dense_known_or_in_the_loop() -> None:
    assert costs().step(alone(1)) == ("dense", pytest.approx(0.040))
    assert costs().step(alone(64)) == ("dense", pytest.approx(0.080))
    assert costs().step(np.tile(KNOWN, (64, 1))) == ("known", pytest.approx(0.020))
    # Without the second layer: ends, three layers, K/V in passing; nobody is regrouped.
    assert costs().step(alone(1, 2, 3)) == ("loop", pytest.approx(0.001 + 3 * 0.012 + 0.0005))
    # One of two rows leaves out the first MLP: one group more, and back.
    kind, seconds = costs().step(rows({1}, set()))
    step = 1 / 63
    both = 0.001 + 4 * 0.004 * (1 + step) + 3 * 0.008 * (1 + step) + 0.008
    assert kind == "loop" and seconds == pytest.approx(both + 2 * 0.00025 * (1 + step))


def test_between_and_beyond_the_sizes_times_go_on_in_straight_lines() -> None:
    middle, beyond = (costs().step(alone(count))[1] for count in (32, 127))
    assert middle == pytest.approx(0.040 + 0.040 * 31 / 63) and beyond == pytest.approx(0.120)
    assert Costs([1], TABLE[:, :1], [KNOWN]).step(alone(9))[1] == pytest.approx(0.040)


@given(arrays(bool, st.tuples(st.integers(1, 9), st.just(2 * LAYERS))), st.data())
def test_leaving_out_more_of_one_sub_layer_never_costs_more_but_for_groups(
    skips: Bools, data: st.DataObject
) -> None:
    free = TABLE.copy()
    free[[4, 5]] = 0  # neither K/V in passing nor groups
    priced = Costs([1, 64], free[:-1], [])
    sub_layer = data.draw(st.integers(0, 2 * LAYERS - 1))
    more = skips.copy()
    more[:, sub_layer] = True
    if skips.any():
        assert priced.step(more)[1] <= priced.step(skips)[1] + 1e-12


def guard() -> Guard:
    one = Guard(costs)
    one.measure()
    return one


def test_a_plan_that_costs_more_than_it_saves_is_not_followed() -> None:
    one = guard()
    assert not one.admits(alone(1, 1), alone(1), 1)  # 41 against 40
    assert one.admits(alone(1, *range(1, 8)), alone(1), 1)
    assert one.sequences == {"followed": 1, "slower": 1, "margin": 0}
    assert one.report()["last"]["dense"] == 40


def test_near_the_limit_it_does_not_flap() -> None:
    """At 39.5 of 40 it stays with what it did; what it does then is not undone by a hair."""
    near, good = alone(1, 2, 3), alone(1, *range(1, 8))
    table = TABLE.copy()
    table[1] = 0.003  # so that near takes 39.5 ms
    one = Guard(lambda: Costs([1, 64], table[:-1], []))
    one.factors[:] = 1  # as if all had been seen
    assert one.admits(near, alone(1), 1)  # nothing speaks against it at first
    assert not one.admits(alone(1, 1), alone(1), 1)
    assert not one.admits(near, alone(1), 3)  # saves less than AGAIN
    assert one.sequences["margin"] == 3
    assert one.admits(good, alone(1), 1) and one.admits(near, alone(1), 1)
    verdicts = set()
    for turn in range(200):  # load around the threshold
        one.factors[sort_of("loop", near)] = 1 + (0.005 if turn % 2 else -0.005)
        verdicts.add(one.admits(near, alone(1), 1))
    assert verdicts == {True} and AGAIN > 0.01


def test_what_others_named_themselves_counts_on_both_sides() -> None:
    """A lone sequence whose plan would take a batch out of the compiled step stays dense."""
    one = guard()
    beside_dense = rows(*[set()] * 15, {*range(1, 8)})
    assert not one.admits(beside_dense, np.zeros_like(beside_dense), 1)
    beside_plans = rows(*[{1}] * 15, {1, 2, 3})
    least = rows(*[{1}] * 15, set())
    assert one.admits(beside_plans, least, 1)  # the batch runs in the loop anyway


def factor(one: Guard, skips: Bools) -> float:
    return float(one.factors[sort_of(one.costs.step(skips)[0], skips)])  # type: ignore[union-attr]


def test_what_is_learnt_of_one_sort_of_step_says_nothing_of_another() -> None:
    """Steps that leave out half and are cheap do not make those that leave out little seem so."""
    one = guard()
    little, half = alone(1, 3), alone(1, 2, 3, 4, 5)
    for _ in range(50):
        one.saw(~half, 0.020)  # less than was reckoned
        one.saw(~little, 0.048)  # more
        one.saw(~alone(1), 0.040)
    assert one.admits(half, alone(1), 1) and not one.admits(little, alone(1), 1)


def test_the_loop_is_doubted_until_some_of_its_steps_were_seen() -> None:
    """What is measured at start-up has no attention over a cache; dense steps say how much that is.

    At 135M and batch 16, dense steps took 1.4 times what was measured, those of the loop 1.9 times.
    """
    one = guard()
    little = alone(1, 2, 3, 5)  # 29 of 40, by what was measured
    assert one.admits(little, alone(1), 1)
    for _ in range(20):
        one.saw(~alone(1), 0.056)
    assert factor(one, little) == pytest.approx(1.4 * DOUBT, rel=0.02)
    for _ in range(20):
        one.saw(~little, 0.028)
    assert factor(one, alone(1)) == pytest.approx(1.4, rel=0.02)  # the loop says nothing of it


def test_what_is_seen_while_serving_corrects_what_was_measured() -> None:
    one = guard()
    plan = alone(1, 2, 3, 4, 5)
    assert one.admits(plan, alone(1), 1)  # 26 against 40
    for _ in range(100):
        one.saw(~alone(1), 0.040)
        one.saw(~plan, 0.052)  # twice what was reckoned
    assert factor(one, plan) == pytest.approx(2, abs=0.1)
    assert factor(one, alone(1)) == pytest.approx(1)
    assert not one.admits(plan, alone(1), 1)


def test_one_disturbed_step_changes_nothing() -> None:
    one = guard()
    for seconds in [0.040] * 20 + [4.0]:
        one.saw(~alone(1), seconds)
    assert factor(one, alone(1)) < 1.04


def test_a_slower_machine_is_no_reason_to_change() -> None:
    """While dense steps alone run, what plans take is taken to change with them."""
    one = guard()
    for seconds in (0.040, 0.080):
        for _ in range(2 * STALE):
            one.saw(~alone(1), seconds)
    assert factor(one, alone(1)) == pytest.approx(2, abs=0.05)
    assert 2 < factor(one, alone(1, 2, 3)) < 2 * DOUBT


def test_what_was_disturbed_long_ago_is_tried_again() -> None:
    one = guard()
    plan = alone(1, 2, 3, 4, 5)
    for _ in range(50):
        one.saw(~plan, 0.080)
    assert not one.admits(plan, alone(1), 1)
    for _ in range(4000):
        one.saw(~alone(1), 0.040)
    assert one.admits(plan, alone(1), 1)


def test_all_ranks_judge_by_the_first_one_s_clock() -> None:
    first, second = guard(), Guard(costs, lambda _: first.factors)
    for _ in range(50):
        first.saw(~alone(1, 2, 3), 0.074)
        second.saw(~alone(1, 2, 3), 0.037)
    plans = alone(1, *range(1, 8)), alone(1, 2, 3), alone(1, 2, 3, 4, 5)
    verdicts = [[one.admits(plan, alone(1), 1) for plan in plans] for one in (first, second)]
    assert verdicts[0] == verdicts[1] == [True, False, False]


def test_measuring_takes_the_fastest_turn_and_never_more_for_fewer_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter([9.0, 3.0, 5.0, 4.0, 2.0, 2.5, 7.0, 2.2])  # two sizes of one run, four turns each
    monkeypatch.setattr(guarding, "_seconds", lambda _: next(clock))
    run: Callable[[int], list[Callable[[], Any]]] = lambda size: [lambda: size]  # noqa: E731
    assert measured(run, [1, 4]).tolist() == [[2.0, 2.0]]


def test_blocks_of_sequences_whose_plan_hangs_on_the_batch_are_found_by_nobody() -> None:
    facts = {"method": "static", "method_options": {"skip": [1]}, "kv_fill": "copy"}
    shape = DecoderShape(LAYERS, 10, 20)
    free, guarded = (Planner(EngineFacts(shape, guard=on, **facts)) for on in (False, True))  # type: ignore[arg-type]
    assert block_mark(free, None, 5) is not unfindable
    assert block_mark(guarded, None, 5) is unfindable
    named = {"adaskip_skip": [2]}
    assert block_mark(guarded, named, 5)() == block_mark(free, named, 5)()  # type: ignore[misc]
    assert block_mark(guarded, {"adaskip": "off"}, 5) is None


def test_a_method_that_decides_inside_a_step_cannot_be_guarded() -> None:
    with pytest.raises(ValueError, match="guard: True is not allowed with method 'exit'"):
        Planner(
            EngineFacts(
                DecoderShape(LAYERS, 10, 20),
                method="exit",
                method_options={"layers": 2, "scope": "answer"},
                guard=True,
            )
        )
