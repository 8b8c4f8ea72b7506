# SPDX-License-Identifier: Apache-2.0
"""Which requests may find each other's blocks with generated tokens."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_adaskip import DecoderShape
from vllm_adaskip.engine.blocks import block_mark, unfindable
from vllm_adaskip.engine.request import EngineFacts, Planner

SHAPE = DecoderShape(4, attention_parameters=1, mlp_parameters=3)
ALL_ATTENTION = [f"attn:{layer}" for layer in range(4)]


def planner(kv_fill: str = "copy", **facts: Any) -> Planner:
    return Planner(EngineFacts(SHAPE, kv_fill=kv_fill, **facts))


def mark(one: Planner, skip: list[int | str], prompt_len: int = 9) -> bytes | None:
    found = block_mark(one, {"adaskip_skip": skip}, prompt_len)
    return found and found()


def test_same_plan_and_same_prompt_length_have_the_same_mark() -> None:
    assert mark(planner(), [1, "mlp:2"]) == mark(planner(), ["mlp:2", "attn:1", "mlp:1"])


def test_another_plan_or_prompt_length_has_another_mark() -> None:
    marks = [
        mark(planner(), [1]),
        mark(planner(), ["attn:1"]),
        mark(planner(), ["mlp:1"]),
        mark(planner(), [1], prompt_len=8),
    ]
    assert None not in marks and len(set(marks)) == len(marks)


def test_dense_requests_have_none_unless_a_method_reads_prompts() -> None:
    assert mark(planner(), []) is None
    assert block_mark(planner(), None, 9) is None
    reads = planner(method="adaskip", max_compute=0.7)
    assert mark(reads, []) is not None
    assert block_mark(reads, {"adaskip": "off"}, 9) is not None


def test_gated_requests_have_one_of_their_own() -> None:
    gated = planner(method="ffn-skip", method_options={"scope": "token"})
    marks = [
        block_mark(gated, None, 9),
        block_mark(gated, None, 8),
        block_mark(gated, {"adaskip_max_compute": 0.9}, 9),
        block_mark(gated, {"adaskip_skip": ["mlp:2"]}, 9),  # the plan that meets the budget
    ]
    assert len({one() for one in marks if one}) == 4
    assert block_mark(gated, {"adaskip": "off"}, 9) is None  # the method reads no prompts


def test_budgets_tell_decided_plans_apart() -> None:
    reads = planner(method="adaskip", max_compute=0.9)
    marks = [block_mark(reads, args, 9) for args in (None, {"adaskip_max_compute": 0.7})]
    assert len({one() for one in marks if one}) == 2


def test_a_decided_plan_is_told_apart_from_the_same_plan_of_a_request() -> None:
    reads = planner(method="adaskip", max_compute=0.7)
    decided = block_mark(reads, None, 9)
    assert decided is not None
    assert decided() not in {mark(reads, skip) for skip in ([], [1], [2], [1, 2], ["mlp:1"])}


def test_blocks_of_a_plan_that_depends_on_the_batch_are_found_by_nobody() -> None:
    """Those of requests that bring a plan, or are dense, do not depend on it."""
    facts = {"method": "adaskip", "max_compute": 0.7}
    draws = planner(**facts, coalesce_regret=0.1)
    assert block_mark(draws, None, 9) is unfindable
    assert block_mark(draws, {"adaskip_max_compute": 0.6}, 9) is unfindable
    for arguments in ({"adaskip_skip": [1]}, {"adaskip": "off"}):
        marks = [block_mark(one, arguments, 9) for one in (draws, planner(**facts))]
        assert len({one() for one in marks if one}) == 1


@pytest.mark.parametrize(
    ("kv_fill", "skip", "has_holes"),
    [
        ("none", [1], True),
        ("none", ["attn:1"], True),
        ("none", ["mlp:1"], False),
        ("copy", [1], False),
        ("copy", ALL_ATTENTION, True),
        ("project", ALL_ATTENTION, False),
    ],
)
def test_blocks_with_holes_have_a_mark_that_never_comes_again(
    kv_fill: str, skip: list[int | str], has_holes: bool
) -> None:
    found = block_mark(planner(kv_fill), {"adaskip_skip": skip}, 9)
    assert found is not None and (found is unfindable) is has_holes
    assert (found() != found()) is has_holes


def test_a_plan_that_is_not_decided_yet_counts_as_one_with_holes() -> None:
    assert block_mark(planner("none", method="adaskip", max_compute=0.7), None, 9) is unfindable
