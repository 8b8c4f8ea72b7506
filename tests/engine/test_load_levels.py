# SPDX-License-Identifier: Apache-2.0
"""Plans by load: a sequence gets what the level says when it is first scheduled, and keeps it.

Fails when a level flaps, when a request's own plan gives way to a level, when a sequence changes
its plan in the middle, or when blocks of a plan are found by dense requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from helpers.batches import Entries, random_prompts, sampling, small_blocks
from helpers.reference import Reference
from hypothesis import given
from hypothesis import strategies as st

from vllm_adaskip import engine_args, request
from vllm_adaskip.config import AdaSkipConfig, ConfigError
from vllm_adaskip.engine.busy import BusyPlans, Levels, Load

TOKENS, BLOCK = 12, 32
PLAN: Entries = [2, 5]
LEVEL: dict[str, Any] = {"max_compute": 0.8, "enter": {"waiting": 4}, "leave": {"waiting": 1}}
BUSY: dict[str, Any] = {"levels": [LEVEL], "min_seconds": 0.0}
ALL: dict[str, Any] = {"levels": [{**LEVEL, "max_compute": 1.0}]}
STATIC: dict[str, Any] = {"method": "static", "skip": PLAN}
LOADS = st.lists(st.integers(0, 12), max_size=60)


def levels(min_seconds: float) -> Levels:
    two = [
        {"max_compute": 0.8, "enter": {"running": 4}, "leave": {"running": 2}},
        {"max_compute": 0.6, "enter": {"running": 8}, "leave": {"running": 6}},
    ]
    return Levels(BusyPlans.model_validate({"levels": two, "min_seconds": min_seconds}))


@given(loads=LOADS, min_seconds=st.integers(0, 5))
def test_a_level_stays_for_a_while_and_follows_the_load_in_the_end(
    loads: list[int], min_seconds: int
) -> None:
    one, changed = levels(float(min_seconds)), list[int]()
    for at, running in enumerate(loads):
        before = one.now
        if one.saw(Load(0, running, 0.0), float(at)):
            changed.append(at)
            assert one.now != before
        else:
            assert one.now == before
    assert all(later - earlier >= min_seconds for earlier, later in pairwise(changed))
    for running, wanted in ((12, 2), (7, 2), (6, 1), (3, 1), (2, 0), (3, 0), (4, 1), (0, 0)):
        for at in range(len(loads), len(loads) + 2 * min_seconds + 2):
            one.saw(Load(0, running, 0.0), float(at))
        loads = [*loads, *[0] * (2 * min_seconds + 2)]
        assert one.now == wanted


def test_one_signal_is_enough_to_enter_and_all_must_be_low_to_leave() -> None:
    level = {
        "max_compute": 0.5,
        "enter": {"waiting": 5, "kv_use": 0.9},
        "leave": {"waiting": 1, "kv_use": 0.5},
    }
    one = Levels(BusyPlans.model_validate({"levels": [level], "min_seconds": 0.0}))
    loads = [(4, 99, 0.8), (0, 9, 0.9), (0, 9, 0.6), (1, 9, 0.5)]
    seen = [one.saw(Load(*load), 0.0) for load in loads]
    assert seen == [False, True, False, True]


@pytest.mark.parametrize(
    ("busy", "words"),
    [
        ({"levels": []}, "at least 1 item"),
        ({"levels": [{**LEVEL, "max_compute": 0}]}, "greater than 0"),
        ({"levels": [LEVEL, LEVEL]}, "max_compute must fall"),
        ({"levels": [{**LEVEL, "enter": {}}]}, "names nothing; allowed: waiting, running, kv_use"),
        ({"levels": [{**LEVEL, "leave": {"running": 1}}]}, "must name the same"),
        ({"levels": [{**LEVEL, "leave": {"waiting": 4}}]}, "must be less than 'enter': waiting"),
        ({"levels": [{**LEVEL, "enter": {"load": 4}}]}, "load"),
        ({"levels": [LEVEL], "min_seconds": -1}, "greater than or equal to 0"),
        ({"levels": [LEVEL], "hold": 1}, "unknown option; allowed: levels, min_seconds"),
        (4, "dictionary"),
    ],
)
def test_what_cannot_be_is_refused(busy: object, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"adaskip\.busy.*{words}"):
        AdaSkipConfig.parse({**STATIC, "busy": busy})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "none"}, "busy: a budget of 0.8 cannot be met: method 'none'"),
        ({"method": "none", "busy": ALL}, "leaves nothing out at any level"),
        ({**STATIC, "skip": [2]}, "busy: a budget of 0.8 cannot be met: method 'static'"),
        ({"method": "ffn-skip", "scope": "token"}, "decides once a sequence"),
    ],
)
def test_a_method_that_cannot_is_refused(
    engine: Callable[..., Any], tiny_llama: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        engine(tiny_llama, **engine_args(**{"busy": BUSY, **options}))


@pytest.fixture(scope="module")
def make(engine: Callable[..., Any], tiny_llama: str) -> Callable[..., Any]:
    return small_blocks(engine, tiny_llama, BLOCK)


def run(
    llm: Any, prompts: Sequence[list[int]], arguments: Sequence[dict[str, Any] | None], **more: Any
) -> list[Any]:
    outputs: list[Any] = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        [sampling(None, **{"max_tokens": TOKENS, "extra_args": one, **more}) for one in arguments],
        use_tqdm=False,
    )
    return outputs


def tokens(outputs: Sequence[Any]) -> list[list[int]]:
    return [list(each.outputs[0].token_ids) for each in outputs]


def test_what_waits_gets_plans_and_what_comes_alone_runs_dense(
    make: Callable[..., Any], reference: Reference
) -> None:
    llm, prompts = make("copy", {**STATIC, "busy": BUSY}), random_prompts(6, 8)
    (before,) = llm.collective_rpc("adaskip_report")
    own = [None] * 6 + [request(skip=[1]), request(skip=[])]
    plans: list[Entries] = [PLAN] * 6 + [[1], []]
    wanted = [
        reference.generate(prompt, plan, TOKENS, kv_fill="none")[0]
        for prompt, plan in zip(prompts, plans, strict=True)
    ]
    assert tokens(run(llm, prompts, own)) == wanted
    asked = [(None, prompts[0]), (own[6], prompts[6]), (None, [1, 2])]
    assert llm.collective_rpc("adaskip_plans", args=(asked,))[0] == [PLAN, [1], None]
    for prompt in prompts[:2]:
        assert tokens(run(llm, [prompt], [None])) == [reference.generate(prompt, [], TOKENS)[0]]
    assert llm.collective_rpc("adaskip_plans", args=(asked[:1],))[0] == [[]]
    (after,) = llm.collective_rpc("adaskip_report")
    entered = [
        late - early
        for late, early in zip(after["busy"]["entered"], before["busy"]["entered"], strict=True)
    ]
    assert (after["busy"]["level"], entered) == (0, [2, 8])


def test_a_sequence_keeps_its_plan_through_preemption(
    make: Callable[..., Any], reference: Reference
) -> None:
    soon = {"levels": [{**LEVEL, "leave": {"waiting": 3}}], "min_seconds": 0.0}
    llm = make("copy", {**STATIC, "busy": soon}, num_gpu_blocks_override=9)
    prompts = [prompt * 60 for prompt in random_prompts(7, 8, longest=1)]
    prompts = [[*prompt[:40], at] for at, prompt in enumerate(prompts)]
    found = tokens(run(llm, prompts, [None] * 8, max_tokens=40))
    kinds = set[str]()
    for prompt, own in zip(prompts, found, strict=True):
        dense, planned = (reference.generate(prompt, plan, 40)[0] for plan in ([], PLAN))
        assert own in (dense, planned)
        kinds.add("dense" if own == dense else "planned")
    (report,) = llm.collective_rpc("adaskip_report")
    assert report["prompt_tokens"] > sum(map(len, prompts))  # some were preempted
    assert kinds == {"dense", "planned"} and min(report["busy"]["entered"]) > 0


def test_dense_answers_are_found_by_all_and_planned_ones_by_nobody(
    make: Callable[..., Any],
) -> None:
    llm = make("copy", {**STATIC, "busy": BUSY})
    prompts = [[at + 1] * 40 for at in range(6)]
    many = run(llm, prompts, [None] * 6, max_tokens=60)
    one = run(llm, [[9] * 40], [None], max_tokens=60)[0]
    turns = [[*each.prompt_token_ids, *each.outputs[0].token_ids] for each in (one, many[0])]
    again = [run(llm, [turn], [None], max_tokens=2)[0].num_cached_tokens for turn in turns]
    assert again == [96, 32]
