# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace
from typing import Any

import pytest

from vllm_adaskip import DecoderShape
from vllm_adaskip.engine.blocks import prompt_mark
from vllm_adaskip.engine.prompt_plan import TAIL
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
        (NONE, {"adaskip_max_compute": 1}, "dense"),
        (NONE, {"adaskip_skip": [1, "mlp:2"]}, "skip 1, mlp:2"),
        (NONE, {"adaskip_skip": [1, 2, 3, 4], "adaskip_max_compute": 0.5}, "skip 1-4"),
        (STATIC, None, "skip 3, attn:5"),
        (STATIC, {"adaskip": "on"}, "skip 3, attn:5"),
        (STATIC, {"adaskip_max_compute": 0.9}, "skip 3, attn:5"),
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
        ({"adaskipü": 1}, ["adaskipü", "adaskip_max_compute"]),
        ({"adaskip": "maybe"}, ["adaskip:", "'maybe'", "'on', 'off'"]),
        ({"adaskip": True}, ["adaskip:", "True", "'on', 'off'"]),
        ({"adaskip": "off", "adaskip_skip": [1]}, ["'off'", "adaskip_skip"]),
        ({"adaskip_skip": "attn:1"}, ["adaskip_skip", "'attn:1'", "a list"]),
        ({"adaskip_skip": [8]}, ["adaskip_skip", "8", "0 to 7"]),
        ({"adaskip_skip": list(range(8))}, ["adaskip_skip", "all 16 sub-layers"]),
        ({"adaskip_max_compute": 0}, ["adaskip_max_compute", "0", "(0, 1]"]),
        ({"adaskip_max_compute": 1.01}, ["adaskip_max_compute", "1.01"]),
        ({"adaskip_max_compute": float("nan")}, ["adaskip_max_compute", "nan"]),
        ({"adaskip_max_compute": "half"}, ["adaskip_max_compute", "'half'"]),
        ({"adaskip_max_compute": True}, ["adaskip_max_compute", "True"]),
        ({"adaskip_max_compute": 0.5}, ["adaskip_max_compute", "method 'none'"]),
        ({"adaskip_skip": [1], "adaskip_max_compute": 0.5}, ["adaskip_max_compute", "keeps 0.875"]),
        ({"adaskip_prompt_exit": 0}, ["adaskip_prompt_exit", "0", "1 to 8"]),
        ({"adaskip_prompt_exit": 9}, ["adaskip_prompt_exit", "9", "1 to 8"]),
        ({"adaskip_prompt_exit": True}, ["adaskip_prompt_exit", "True"]),
        ({"adaskip_prompt_exit": "4"}, ["adaskip_prompt_exit", "'4'"]),
        ({"adaskip_prompt_exit": 10**50}, ["adaskip_prompt_exit", "beyond 64 bits"]),
        ({"adaskip_prompt_skip": [8]}, ["adaskip_prompt_skip", "0 to 7"]),
        ({"adaskip_prompt_skip": list(range(8))}, ["adaskip_prompt_skip", "all 16 sub-layers"]),
        ({"adaskip_prompt_exit": 4, "adaskip_prompt_skip": [1]}, ["leave one out"]),
        (
            {"adaskip_prompt_exit": 4, "adaskip_prompt_tail": 0},
            ["adaskip_prompt_tail", "1 or more"],
        ),
        ({"adaskip_prompt_exit": 4, "adaskip_prompt_tail": 1.5}, ["adaskip_prompt_tail", "1.5"]),
        ({"adaskip_prompt_tail": 4}, ["adaskip_prompt_tail", "needs adaskip_prompt_exit"]),
        ({"adaskip": "off", "adaskip_prompt_exit": 4}, ["'off'", "adaskip_prompt_exit"]),
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
        {"adaskip_max_compute": "x" * 10**6},
        {"adaskip_max_compute": [10**5000]},
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
        {"adaskip_max_compute": 2},
        {"adaskip_max_compute": 0.5},
        {"adaskip_max_compute": 0.5, "adaskip_skip": [1]},
    ]
    for args in allowed:
        planner.admit(args)
    for args in refused:
        with pytest.raises(RequestError):
            planner.admit(args)
    want = {"adaskip": 1, "adaskip_skip": 1, "adaskip_max_compute": 3, "unknown": 2}
    assert {reason: count for reason, count in planner.refused.items() if count} == want


def test_a_budget_below_what_static_keeps_is_refused() -> None:
    with pytest.raises(RequestError, match=r"adaskip_max_compute.*'static'.*keeps 0\.844"):
        STATIC.wanted({"adaskip_max_compute": 0.8})


def test_planner_facts_survive_the_way_to_another_process() -> None:
    again = EngineFacts.from_json(STATIC.facts.to_json())
    assert again == STATIC.facts
    assert Planner(again).wanted(None) == STATIC.wanted(None)


@pytest.mark.parametrize(
    ("args", "plan"),
    [
        (None, "skip 4-7 tail 5"),
        ({"adaskip": "off"}, None),
        ({"adaskip_skip": [1]}, "skip 4-7 tail 5"),
        ({"adaskip_prompt_exit": 6}, "skip 6-7 tail 5"),
        ({"adaskip_prompt_exit": 8}, None),
        ({"adaskip_prompt_skip": []}, None),
        ({"adaskip_prompt_skip": ["mlp:0"], "adaskip_prompt_tail": 1}, "skip mlp:0 tail 1"),
        ({"adaskip_prompt_tail": 9}, "skip 4-7 tail 9"),
    ],
)
def test_a_prompt_plan_is_the_request_s_or_the_server_s(
    args: dict[str, Any] | None, plan: str | None
) -> None:
    server = Planner(EngineFacts(SHAPE, prompt={"exit": 4, "tail": 5, "from": 20}))
    found = server.wanted(args).prompt
    assert (found and f"{found.plan} tail {found.tail}") == plan


def test_the_last_tokens_of_a_long_enough_prompt_run_everything() -> None:
    one = Planner(EngineFacts(SHAPE, prompt={"skip": [3], "tail": 5, "from": 20})).prompt
    assert one is not None
    assert [one.full_from(length) for length in (1, 19, 20, 100)] == [0, 0, 15, 95]
    assert Planner(EngineFacts(SHAPE, prompt={"exit": 8})).prompt is None


def test_a_prompt_that_leaves_it_open_can_be_told_to_run_whole() -> None:
    server = Planner(EngineFacts(SHAPE, prompt={"exit": 4}))
    for args in (None, {"adaskip_skip": [2]}, {"adaskip_prompt_tail": 3}):
        assert server.wanted(args).prompt is not None
        assert server.wanted(server.with_whole_prompt(args)).prompt is None
    for args in ({"adaskip": "off"}, {"adaskip_prompt_exit": 5}, {"adaskip_prompt_skip": [5]}):
        assert server.with_whole_prompt(args) == args
    assert NONE.with_whole_prompt({"adaskip_skip": [2]}) == {"adaskip_skip": [2]}


def test_a_method_that_reads_whole_prompts_does_not_go_with_prompt_plans() -> None:
    facts = EngineFacts(SHAPE, "adaskip", max_compute=0.9)
    with pytest.raises(RequestError, match=r"adaskip_prompt_exit: 'skip 4-7' .*'adaskip'"):
        Planner(facts).wanted({"adaskip_prompt_exit": 4})
    with pytest.raises(ValueError, match=r"prompt: 'skip 4-7' .*'adaskip'"):
        Planner(replace(facts, prompt={"exit": 4}))


def test_blocks_under_a_prompt_plan_are_told_apart_by_it_and_by_where_it_ends() -> None:
    marks = {
        (exit, length): prompt_mark(NONE, {"adaskip_prompt_exit": exit}, length)
        for exit in (4, 5)
        for length in (40, 60)
    }
    found = {(*key, end): mark(end) for key, mark in marks.items() for end in (16, 32, 48) if mark}
    assert found[4, 40, 16] == found[4, 60, 16] == found[4, 60, 32]  # before either's tail
    assert len({*found.values()}) == 2 + 4  # the others have tokens of a tail, or would have
    assert prompt_mark(NONE, {"adaskip_prompt_exit": 8}, 40) is None
    assert prompt_mark(NONE, {"adaskip_prompt_exit": 4}, TAIL) is None
    assert prompt_mark(NONE, None, 40) is None
