# SPDX-License-Identifier: Apache-2.0
"""A request that asks for it is told in its output what it got, by the scheduler that knows.

Fails when what is told is not what ran, when an output lacks it however the request ended, or when
requests that do not ask get it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from helpers.batches import Entries, random_prompts, sampling, small_blocks
from vllm.exceptions import VLLMValidationError

from vllm_adaskip import engine_args, request

TOKENS, BLOCK = 6, 32
PLAN: Entries = [2, 5]
LESS: Entries = [2]
LADDER: dict[str, Any] = {"method": "static", "skip": PLAN, "ladder": [LESS]}
LEVEL: dict[str, Any] = {"max_compute": 0.8, "enter": {"waiting": 4}, "leave": {"waiting": 1}}
SHOW = request(show_plan=True)


@pytest.fixture(scope="module")
def make(engine: Callable[..., Any], tiny_llama: str) -> Callable[..., Any]:
    return small_blocks(engine, tiny_llama, BLOCK)


def shown(
    llm: Any, arguments: Sequence[dict[str, Any] | None], **more: Any
) -> list[dict[str, Any] | None]:
    """Return what each request is told."""
    prompts = random_prompts(8, len(arguments), longest=40)
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        [sampling(None, **{"max_tokens": TOKENS, "extra_args": one, **more}) for one in arguments],
        use_tqdm=False,
    )
    told = [each.kv_transfer_params for each in outputs]
    return [None if one is None else one["adaskip"] for one in told]


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_it_is_what_the_request_got(make: Callable[..., Any], prefix_caching: bool) -> None:
    llm = make("copy", LADDER, enable_prefix_caching=prefix_caching)
    own = [
        request(skip=["mlp:3"], show_plan=True),
        request(off=True, show_plan=True),
        SHOW,
        request(max_compute=0.8, show_plan=True),
        request(prompt_exit=4, prompt_tail=2, show_plan=True),
        request(skip=[1]),
        None,
    ]
    found = shown(llm, own)
    assert [one and one["skip"] for one in found[:5]] == [["mlp:3"], [], LESS, PLAN, LESS]
    assert found[1] == {"skip": [], "compute": 1.0}
    assert found[4] == {
        "skip": LESS, "compute": 0.875, "prompt_skip": [4, 5, 6, 7], "prompt_tail": 2,
    }  # fmt: skip
    assert found[5:] == [None, None]


def test_a_request_that_ends_in_the_front_end_is_told_too(make: Callable[..., Any]) -> None:
    llm = make("copy", LADDER)
    assert shown(llm, [SHOW], max_tokens=1) == shown(llm, [SHOW], n=3, temperature=1.0)
    (prompt,) = random_prompts(8, 1, longest=40)
    params = sampling(None, max_tokens=40, extra_args=SHOW)
    (whole,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    params.stop_token_ids = [whole.outputs[0].token_ids[2]]
    (ended,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    assert ended.outputs[0].finish_reason == "stop"
    assert ended.kv_transfer_params == whole.kv_transfer_params


def test_levels_of_load_are_told(make: Callable[..., Any]) -> None:
    llm = make("copy", {**LADDER, "busy": {"levels": [LEVEL], "min_seconds": 0.0}})
    found = [one for one in shown(llm, [SHOW] * 8) if one is not None]
    (report,) = llm.collective_rpc("adaskip_report")
    told = [one["level"] for one in found]
    assert [told.count(0), told.count(1)] == report["busy"]["entered"]
    assert {(one["level"], str(one["skip"])) for one in found} == {(1, str(PLAN))}
    assert shown(llm, [SHOW]) == [{"skip": [], "compute": 1.0, "level": 0}]


def test_a_plan_that_the_prompt_decides_is_not_known_there(make: Callable[..., Any]) -> None:
    llm = make("copy", {"method": "adaskip", "max_compute": 0.75})
    assert shown(llm, [SHOW]) == [{"skip": None}]


def test_bad_values_are_refused(make: Callable[..., Any]) -> None:
    llm = make("copy", LADDER)
    for value in ("yes", True, 1, None, [1]):
        with pytest.raises(VLLMValidationError, match=r"adaskip_show_plan.*allowed: 'on', 'off'"):
            shown(llm, [{"adaskip_show_plan": value}])


def test_a_scheduler_of_the_users_is_left_alone(
    engine: Callable[..., Any], tiny_llama: str
) -> None:
    theirs = "vllm.v1.core.sched.scheduler.Scheduler"
    llm = engine(
        tiny_llama, enable_prefix_caching=False, scheduler_cls=theirs, **engine_args(**LADDER)
    )
    assert shown(llm, [SHOW]) == [None]
