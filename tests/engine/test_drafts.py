# SPDX-License-Identifier: Apache-2.0
"""What is drafted, and when: the rules that decide how many tokens a step drafts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from vllm_adaskip import DecoderShape
from vllm_adaskip.classifiers import PlanError
from vllm_adaskip.engine.drafts import (
    PROBING,
    TRIES,
    Calibration,
    Draft,
    Drafted,
    DraftOptions,
    Pace,
    Terms,
    Times,
    goes_on,
)
from vllm_adaskip.engine.request import EngineFacts, Planner, RequestError

LAYERS = 4
SHAPE = DecoderShape(LAYERS, 1, 3)
#: A forward takes 10 ms whatever its tokens, up to some, and a pass a fifth of that.
SIZES = (1, 4, 16)
FLAT = np.array([[0.010, 0.010, 0.010], [0.002, 0.002, 0.002]])
#: Every token computes.
STEEP = np.array([[0.010, 0.040, 0.160], [0.005, 0.020, 0.080]])


def pace(table: Any = FLAT) -> Pace:
    return Pace(lambda: Times(SIZES, table), lambda values: values)


def serve(one: Pace, rows: int, accepted: float, steps: int, tokens: int = 3) -> int:
    """Run steps in which tokens of each row are drafted where that is due; return how many were."""
    drafting = 0
    for _ in range(steps):
        if one.terms(rows, rows) is None:
            continue
        assert one.times is not None
        drafting += 1
        seconds = tokens * one.times.a_pass(rows)
        one.saw(rows, tokens * rows, round(accepted * rows), seconds)
    return drafting


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({}, "needs one of 'exit', 'skip' and 'profile'"),
        ({"exit": 2, "skip": [1]}, "needs one of"),
        ({"profile": "p", "vocabulary": 9}, "'vocabulary' does not go with 'profile'"),
        ({"exit": 2, "tokens": 0}, "greater than or equal to 1"),
        ({"exit": 2, "tokens": 17}, "less than or equal to 16"),
        ({"exit": 2, "tokens": True}, "valid integer"),
        ({"exit": 2, "vocabulary": 1}, "greater than or equal to 2"),
        ({"exit": "2"}, "valid integer"),
        ({"exit": 2, "length": 3}, "Extra inputs"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        DraftOptions.model_validate(options)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"exit": 5}, "draft: 5 is not allowed; allowed: 1 to 4"),
        ({"exit": 4}, "leaves out nothing"),
        ({"skip": [7]}, "draft: "),
        ({"skip": []}, "leaves out nothing"),
    ],
)
def test_a_draft_leaves_out_layers_that_the_model_has(options: Any, complaint: str) -> None:
    with pytest.raises(PlanError, match=complaint):
        Draft.of_options(options, LAYERS)


@pytest.mark.parametrize(
    ("facts", "complaint"),
    [
        ({"method": "ffn-skip", "method_options": {"scope": "token"}}, "gate would remember"),
        ({"method": "adaskip", "max_compute": 0.7, "coalesce_regret": 0.1}, "coalesce_regret 0.1"),
    ],
)
def test_what_does_not_go_with_drafts_is_refused(facts: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Planner(EngineFacts(SHAPE, draft={"exit": 2}, **facts))


def test_a_request_may_ask_for_fewer_drafts() -> None:
    planner = Planner(EngineFacts(SHAPE, draft={"exit": 2, "tokens": 3}))
    asked: list[dict[str, Any]] = [{}, {"adaskip_draft": 0}, {"adaskip_draft": 2}]
    assert [planner.wanted(each).drafts for each in asked] == [3, 0, 2]
    off = planner.wanted({"adaskip": "off", "adaskip_draft": 1})
    assert off.drafts == 1 and off.plan is not None and off.plan.is_dense
    assert planner.wanted({"adaskip": "off"}).drafts == 3  # the whole model's answer, faster
    assert planner.wanted({"adaskip_skip": [1]}).drafts == 3


@pytest.mark.parametrize("value", [4, -1, 1.0, True, "2", [1]])
def test_wrong_numbers_of_drafts_are_refused(value: Any) -> None:
    planner = Planner(EngineFacts(SHAPE, draft={"exit": 2, "tokens": 3}))
    with pytest.raises(RequestError, match=r"adaskip_draft: .*allowed: .*0"):
        planner.wanted({"adaskip_draft": value})


def test_a_server_without_drafts_says_so() -> None:
    planner = Planner(EngineFacts(SHAPE))
    assert planner.wanted({"adaskip_draft": 0}).drafts == 0
    with pytest.raises(RequestError, match="this server drafts nothing"):
        planner.wanted({"adaskip_draft": 1})


def test_confidence_is_learnt() -> None:
    one = Calibration()
    sure, unsure = np.array([0.95]), np.array([0.35])
    assert one.of(sure) == pytest.approx(0.95) and one.of(unsure) == pytest.approx(0.35)
    for _ in range(200):
        one.learn([0.95, 0.35, 0.35], accepted=1)  # of the third nobody knows
    assert one.of(sure) > 0.98 and one.of(unsure) < 0.05
    assert one.rate == pytest.approx(0.5, abs=0.05)


@given(st.lists(st.floats(0, 1), max_size=8), st.integers(0, 8))
def test_calibration_stays_a_probability(confidence: list[float], accepted: int) -> None:
    one = Calibration()
    for _ in range(3):
        one.learn(confidence, min(accepted, len(confidence)))
    found = one.of(np.linspace(0, 1, 50))
    assert (found >= 0).all() and (found <= 1).all() and 0 <= one.rate <= 1


@pytest.mark.parametrize("rows", [1, 5])
def test_drafts_that_are_accepted_are_made_in_every_step(rows: int) -> None:
    assert serve(pace(), rows, accepted=2.5, steps=300) == 300


@pytest.mark.parametrize("rows", [1, 5])
def test_drafts_that_are_not_accepted_stop(rows: int) -> None:
    """Their cost, a pass and no token, stays within what may be tried."""
    one = pace()
    drafting = serve(one, rows, accepted=0.1, steps=2000)
    cost = 3 * 0.002 / 0.010
    assert TRIES < drafting < TRIES + 2000 * PROBING / cost * 1.1


@pytest.mark.parametrize(
    ("right", "least", "most"),
    [(0.50, 0.99, 1.0), (0.34, 0.9, 1.0), (0.10, 0.0, 0.2), (0.02, 0.0, 0.07)],
)
def test_luck_decides_little(right: float, least: float, most: float) -> None:
    """A draft that pays goes on although it is mostly wrong; others end soon.

    Each takes a fifth of a step, so what is right more often pays.
    """
    shares = []
    for seed in range(40):
        one, drawn = pace(), np.random.default_rng(seed).random(400) < right
        shares.append(sum(serve(one, 1, accepted=hit, steps=1, tokens=1) for hit in drawn) / 400)
    assert least <= np.mean(shares) <= most


def test_what_begins_to_pay_is_found() -> None:
    one = pace()
    serve(one, 1, accepted=0.0, steps=500)
    assert one.gains[0].mean < 0
    assert serve(one, 1, accepted=3.0, steps=3000) > 1000


def test_where_computing_is_what_takes_time_nothing_is_drafted() -> None:
    """No acceptance could make up for it, so it is not even tried."""
    assert serve(pace(STEEP), 4, accepted=3, steps=50) == 0


def test_gains_are_learnt_apart_by_rows() -> None:
    one = pace()
    assert serve(one, 1, accepted=2.5, steps=20) == 20
    assert serve(one, 16, accepted=0.0, steps=100) < 20
    assert serve(one, 1, accepted=2.5, steps=20) == 20


def test_what_lost_at_few_rows_is_tried_seldom_at_more() -> None:
    one = pace()
    assert serve(one, 1, accepted=0.1, steps=20) == TRIES
    assert sum(serve(one, rows, accepted=0.1, steps=20) for rows in (2, 4, 8, 16)) == 0
    assert serve(one, 4, accepted=2.5, steps=200) > 100


def test_what_lost_at_many_rows_is_tried_at_fewer() -> None:
    one = pace()
    assert serve(one, 16, accepted=0.1, steps=20) == TRIES
    assert serve(one, 1, accepted=2.5, steps=20) == 20


def test_ranks_follow_the_first() -> None:
    says_no = Pace(lambda: Times(SIZES, FLAT), lambda values: np.zeros(4))
    assert says_no.terms(1, 1) is None
    says_yes = Pace(lambda: Times(SIZES, STEEP), lambda values: np.array([1, 0.1, 0.2, 0.3]))
    assert says_yes.terms(4, 4) == Terms(0.1, 0.2, 0.3)


def test_another_pass_is_made_while_it_pays() -> None:
    terms = Terms(a_pass=0.3, a_token=0.05, rate=0.8)
    assert goes_on(np.array([0.9]), terms)
    assert not goes_on(np.array([0.3]), terms)
    assert goes_on(np.array([0.3, 0.3, 0.01]), terms)  # one pass serves them all


def test_times_follow_the_machine() -> None:
    one = Times(SIZES, FLAT)
    for _ in range(200):
        one.saw_forward(2, 0.030, rest=0.004, verifies=False)
        one.saw_pass(1, 0.001)
    assert one.forward(1) == pytest.approx(0.030, rel=0.01)
    assert one.a_pass(4) == pytest.approx(0.001, rel=0.01)
    assert one.rest == pytest.approx(0.004)
    one.saw_forward(2, 0.030, rest=5.0, verifies=False)  # it waited for a request
    assert one.rest < 0.0042
    assert Times((1,), FLAT[:, :1]).forward(50) == 0.010  # as far as anybody knows
    assert Times(SIZES, STEEP).forward(32) == pytest.approx(0.32)


def test_what_judging_takes_is_part_of_what_drafts_cost() -> None:
    costs = []
    for rest in (0.002, 0.007):
        one = pace()
        one.measure()
        assert one.times is not None
        one.times.saw_forward(1, 0.010, rest=0.002, verifies=False)
        one.times.saw_forward(4, 0.010, rest=0.5, verifies=True)  # the first: a warm-up
        one.times.saw_forward(4, 0.010, rest=rest, verifies=True)
        assert (one.times.rest, one.times.judging) == (0.002, rest)
        one.saw(1, 3, 1, seconds=0.006)
        costs.append(one.gains[0].cost)
        one.saw(1, 0, 0, seconds=0.006)  # nothing was verified
    assert costs == pytest.approx([0.5, 0.5 + 0.005 / 0.012])
    assert one.gains[0].cost == pytest.approx((costs[1] + 0.5) / 2)


def test_places_in_a_draft_are_counted() -> None:
    counts = Drafted(3)
    counts.saw(3, 1)
    counts.saw(2, 2)
    counts.saw(0, 0)
    assert counts.report()["verified"] == [2, 2, 1]
    assert counts.report()["accepted"] == [2, 1, 0]
