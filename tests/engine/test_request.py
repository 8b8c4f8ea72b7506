# SPDX-License-Identifier: Apache-2.0
from typing import Any

import pytest

from vllm_adaskip import DecoderShape
from vllm_adaskip.engine.request import EngineFacts, Planner, RequestError

SHAPE = DecoderShape(8, attention_parameters=1, mlp_parameters=3)
NONE = Planner(EngineFacts(SHAPE))
STATIC = Planner(EngineFacts(SHAPE, "static", {"skip": [3, "attn:5"]}))


@pytest.mark.parametrize(
    ("planner", "args", "plan"),
    [
        (NONE, None, "dense"),
        (NONE, {}, "dense"),
        (NONE, {"somebody_elses": object()}, "dense"),
        (NONE, {"adaskip": "on"}, "dense"),
        (NONE, {"adaskip_budget": 1}, "dense"),
        (NONE, {"adaskip_skip": [1, "mlp:2"]}, "skip 1, mlp:2"),
        (NONE, {"adaskip_skip": [1, 2, 3, 4], "adaskip_budget": 0.5}, "skip 1-4"),
        (STATIC, None, "skip 3, attn:5"),
        (STATIC, {"adaskip": "on"}, "skip 3, attn:5"),
        (STATIC, {"adaskip_budget": 0.9}, "skip 3, attn:5"),
        (STATIC, {"adaskip": "off"}, "dense"),
        (STATIC, {"adaskip_skip": []}, "dense"),
        (STATIC, {"adaskip_skip": ["attn:1"]}, "skip attn:1"),
    ],
)
def test_plan_of_a_request(planner: Planner, args: dict[str, Any] | None, plan: str) -> None:
    assert str(planner.wanted(args).plan) == plan


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"adaskip_skp": [1]}, ["adaskip_skp", "did you mean adaskip_skip"]),
        ({"adaskip-skip": [1]}, ["adaskip-skip", "did you mean adaskip_skip"]),
        ({"Adaskip_Skip": [1]}, ["Adaskip_Skip", "did you mean adaskip_skip"]),
        ({"adaskipü": 1}, ["adaskipü", "adaskip_budget"]),
        ({"adaskip": "maybe"}, ["adaskip:", "'maybe'", "'on', 'off'"]),
        ({"adaskip": True}, ["adaskip:", "True", "'on', 'off'"]),
        ({"adaskip": "off", "adaskip_skip": [1]}, ["'off'", "adaskip_skip"]),
        ({"adaskip_skip": "attn:1"}, ["adaskip_skip", "'attn:1'", "a list"]),
        ({"adaskip_skip": [8]}, ["adaskip_skip", "8", "0 to 7"]),
        ({"adaskip_skip": list(range(8))}, ["adaskip_skip", "all 16 sub-layers"]),
        ({"adaskip_budget": 0}, ["adaskip_budget", "0", "(0, 1]"]),
        ({"adaskip_budget": 1.01}, ["adaskip_budget", "1.01"]),
        ({"adaskip_budget": float("nan")}, ["adaskip_budget", "nan"]),
        ({"adaskip_budget": "half"}, ["adaskip_budget", "'half'"]),
        ({"adaskip_budget": True}, ["adaskip_budget", "True"]),
        ({"adaskip_budget": 0.5}, ["adaskip_budget", "method 'none'"]),
        ({"adaskip_skip": [1], "adaskip_budget": 0.5}, ["adaskip_budget", "keeps 0.875"]),
    ],
)
def test_refusal_names_key_value_and_what_is_allowed(
    args: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(RequestError) as refusal:
        NONE.wanted(args)
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.parametrize(
    "args",
    [
        {"adaskip": [0] * 10**6},
        {"adaskip_budget": "x" * 10**6},
        {"adaskip_budget": [10**5000]},
        {"adaskip_skip": [0] * 10**6},
        {"adaskip_" + "x" * 10**6: 1},
    ],
)
def test_a_huge_argument_has_a_short_refusal(args: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as refusal:
        NONE.wanted(args)
    assert len(str(refusal.value)) < 400


def test_admission_counts_what_it_refuses_by_the_argument_that_is_wrong() -> None:
    planner = Planner(NONE.facts)
    allowed = [None, {"adaskip": "off"}, {"adaskip_skip": [1]}, {"somebody_elses": 1}]
    refused = [
        {"adaskip_a": 1},
        {"adaskip_b": 1},
        {"adaskip": "maybe"},
        {"adaskip_skip": [99]},
        {"adaskip_budget": 2},
        {"adaskip_budget": 0.5},
        {"adaskip_budget": 0.5, "adaskip_skip": [1]},
    ]
    for args in allowed:
        planner.admit(args)
    for args in refused:
        with pytest.raises(RequestError):
            planner.admit(args)
    want = {"adaskip": 1, "adaskip_skip": 1, "adaskip_budget": 3, "unknown": 2}
    assert planner.refused == want


def test_a_budget_below_what_static_keeps_is_refused() -> None:
    with pytest.raises(RequestError, match=r"adaskip_budget.*'static'.*keeps 0\.844"):
        STATIC.wanted({"adaskip_budget": 0.8})


def test_planner_facts_survive_the_way_to_another_process() -> None:
    again = EngineFacts.from_json(STATIC.facts.to_json())
    assert again == STATIC.facts
    assert Planner(again).wanted(None) == STATIC.wanted(None)
