# SPDX-License-Identifier: Apache-2.0
"""The canary reads answers under plans again at full depth, and may switch plans off.

Fails when what is read differs from what a transformers loop says of the same answer, when a client
hears of a reading, when other answers than greedy ones under the server's plans are read, or when
one bad answer, or many looks at good ones, switch plans off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import pytest
import torch
from helpers.batches import Entries, random_prompts, sampling, small_blocks
from helpers.reference import Reference
from hypothesis import given
from hypothesis import strategies as st
from vllm.exceptions import VLLMValidationError

from vllm_adaskip import engine_args, request
from vllm_adaskip.config import AdaSkipConfig, ConfigError
from vllm_adaskip.engine.canary import Canary, CanaryOptions, Reading

TOKENS, BLOCK = 12, 32
PLAN: Entries = [2, 5]
STATIC: dict[str, Any] = {"method": "static", "skip": PLAN}
ALL: dict[str, Any] = {"share": 1.0}
NEVER: dict[str, Any] = {"share": 1.0, "min_agreement": 1.0, "answers": 10}
READINGS = st.builds(Reading, st.floats(0, 1), st.floats(0, 5))


def canary(**options: Any) -> Canary:
    return Canary(CanaryOptions.model_validate({"share": 1.0, "answers": 10, **options}))


@given(readings=st.lists(READINGS, max_size=60), bound=st.floats(0.01, 1))
def test_plans_go_off_at_the_end_of_a_group_alone_and_stay_off(
    readings: list[Reading], bound: float
) -> None:
    one = canary(min_agreement=bound)
    for at, reading in enumerate(readings, 1):
        was_off = one.is_off
        if one.read(reading):
            assert not was_off and one.is_off and at % 10 == 0
            assert fmean(each.agreement for each in readings[at - 10 : at]) < bound
        assert one.is_off >= was_off
    assert one.answers == len(readings)


@given(readings=st.lists(READINGS, max_size=30), more=st.lists(READINGS, max_size=30))
def test_what_begins_anew_judges_as_if_nothing_had_been(
    readings: list[Reading], more: list[Reading]
) -> None:
    one, other = canary(min_agreement=0.5), canary(min_agreement=0.5)
    for each in readings:
        one.read(each)
    one.begin_anew()
    assert [one.read(each) for each in more] == [other.read(each) for each in more]
    assert one.report() == {**other.report(), "answers": len(readings) + len(more)}


def test_a_bound_is_broken_by_a_group_whose_whole_interval_lies_beyond_it() -> None:
    unsure = [Reading(0.5 + 0.4 * (-1) ** at, 0.4) for at in range(10)]
    bad = [Reading(0.5 + 0.01 * (-1) ** at, 0.4 + 0.01 * at) for at in range(10)]
    for options, readings, is_off in [
        ({"min_agreement": 0.6}, unsure, False),
        ({"min_agreement": 0.6}, bad, True),
        ({"min_agreement": 0.4}, bad, False),
        ({"max_surprise": 0.3}, bad, True),
        ({"max_surprise": 0.5}, bad, False),
        ({}, bad, False),
    ]:
        one = canary(**options)
        assert [one.read(each) for each in readings] == [False] * 9 + [is_off]
        assert one.report()["off"] == is_off
    mean, low, high = one.report()["agreement"]
    assert low < mean < high and mean == pytest.approx(0.5)


def test_many_looks_at_answers_just_as_good_as_the_bound_make_few_false_alarms() -> None:
    alarms = 0
    for seed in range(200):
        drawn = torch.rand(200, generator=torch.Generator().manual_seed(seed)).tolist()
        one = canary(min_agreement=0.5, answers=50)
        alarms += any([one.read(Reading(value, 0.0)) for value in drawn])
    assert alarms / 200 < 0.2  # four looks, each beyond two standard errors once in 44


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"share": 0}, "greater than 0"),
        ({"share": 1.1}, "less than or equal to 1"),
        ({}, "required"),
        ({"share": 0.1, "answers": 3}, "greater than or equal to 10"),
        ({"share": 0.1, "min_agreement": 0.0}, "never broken"),
        ({"share": 0.1, "min_agreement": 2.0}, "less than or equal to 1"),
        ({"share": 0.1, "max_surprise": -1.0}, "greater than or equal to 0"),
        ({"share": 0.1, "bound": 1}, "unknown option; allowed: share, max_surprise"),
        (True, "dictionary"),
    ],
)
def test_what_cannot_be_is_refused(options: object, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"adaskip\.canary.*{words}"):
        AdaSkipConfig.parse({**STATIC, "canary": options})


def test_a_method_that_leaves_nothing_to_read_is_refused(
    engine: Callable[..., Any], tiny_llama: str
) -> None:
    with pytest.raises(ValueError, match="canary: method 'none' leaves nothing out"):
        engine(tiny_llama, **engine_args(canary=ALL))


@pytest.fixture(scope="module")
def make(engine: Callable[..., Any], tiny_llama: str) -> Callable[..., Any]:
    return small_blocks(engine, tiny_llama, BLOCK)


def run(
    llm: Any,
    prompts: Sequence[list[int]],
    arguments: Sequence[dict[str, Any] | None] | None = None,
    **more: Any,
) -> list[list[int]]:
    own = arguments or [None] * len(prompts)
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        [sampling(None, **{"max_tokens": TOKENS, "extra_args": one, **more}) for one in own],
        use_tqdm=False,
    )
    return [list(each.outputs[0].token_ids) for each in outputs]


def drain(llm: Any) -> dict[str, Any]:
    """Let readings that wait be done, and return what was found.

    In one process an engine steps only while a client waits. A dense answer is not read.
    """
    for _ in range(3):
        run(llm, [[1, 2, 3]], [request(off=True)], max_tokens=30)
    (report,) = llm.collective_rpc("adaskip_report")
    found: dict[str, Any] = report["canary"]
    return found


def gaps(reference: Reference, prompt: list[int], answer: list[int]) -> list[float]:
    """Return of each token how much likelier transformers' first choice is."""
    with torch.inference_mode():
        logits = reference.model(torch.tensor([[*prompt, *answer]])).logits[0]
    rows = torch.log_softmax(logits.float(), dim=-1)[len(prompt) - 1 : -1]
    return [(row.max() - row[token]).item() for row, token in zip(rows, answer, strict=True)]


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_what_is_read_is_what_transformers_says_of_the_answers(
    make: Callable[..., Any], reference: Reference, prefix_caching: bool
) -> None:
    llm = make("copy", {**STATIC, "canary": ALL}, enable_prefix_caching=prefix_caching)
    prompts = [*random_prompts(3, 6), [7] * BLOCK, [8] * (2 * BLOCK)]
    found = run(llm, prompts)
    assert found == [
        reference.generate(prompt, PLAN, TOKENS, kv_fill="copy")[0] for prompt in prompts
    ]
    assert run(llm, prompts) == found  # their readings find the first ones' prompts, no answers
    read = [gaps(reference, *pair) for pair in zip(prompts, found, strict=True)] * 2
    report = drain(llm)
    assert (report["answers"], report["dropped"], report["off"]) == (16, 0, False)
    agreement = fmean(fmean(gap <= 0 for gap in one) for one in read)
    assert 0 < agreement < 1  # the plan changes answers
    assert report["agreement"][0] == pytest.approx(agreement, abs=1e-3)
    assert report["surprise"][0] == pytest.approx(fmean(map(fmean, read)), abs=1e-3)


def test_only_greedy_answers_under_the_servers_plan_are_read(make: Callable[..., Any]) -> None:
    llm = make("copy", {**STATIC, "canary": ALL})
    prompts = random_prompts(4, 3)
    before = drain(llm)["answers"]
    run(llm, prompts, [request(off=True), request(skip=[1]), request(skip=[])])
    run(llm, prompts, temperature=1.0)
    run(llm, prompts, repetition_penalty=1.2)
    run(llm, prompts, logit_bias={3: 1.0})
    assert drain(llm)["answers"] == before
    (earlier,) = llm.collective_rpc("adaskip_report")
    run(llm, prompts)
    assert drain(llm)["answers"] == before + 3
    (later,) = llm.collective_rpc("adaskip_report")
    assert later["requests"] - earlier["requests"] == 6  # three are drain's, none is a reading
    assert later["plans"]["skipping"] - earlier["plans"]["skipping"] == 3


def test_plans_are_off_when_the_bound_is_broken_and_named_plans_are_followed(
    make: Callable[..., Any], reference: Reference, caplog: pytest.LogCaptureFixture
) -> None:
    llm = make("copy", {**STATIC, "canary": NEVER})
    prompts = random_prompts(5, 10)
    run(llm, prompts)
    assert drain(llm)["off"]
    own = [None, request(skip=[1]), request(max_compute=1.0)]
    plans: list[Entries] = [[], [1], PLAN]
    assert run(llm, prompts[:3], own) == [
        reference.generate(prompt, plan, TOKENS, kv_fill="copy")[0]
        for prompt, plan in zip(prompts, plans, strict=False)
    ]
    asked = [(None, prompts[0]), (own[1], prompts[1])]
    assert llm.collective_rpc("adaskip_plans", args=(asked,))[0] == [[], [1]]
    assert drain(llm)["answers"] == 10  # dense answers are not read


def test_plans_are_on_again_once_the_prefix_cache_is_reset(
    make: Callable[..., Any], reference: Reference
) -> None:
    llm = make("copy", {**STATIC, "canary": NEVER})
    prompts = random_prompts(8, 20)
    run(llm, prompts[:10])
    before = drain(llm)
    assert before["off"]
    llm.reset_prefix_cache()
    assert run(llm, prompts[10:]) == [
        reference.generate(prompt, PLAN, TOKENS, kv_fill="copy")[0] for prompt in prompts[10:]
    ]
    after = drain(llm)  # and goes on judging
    assert after["off"] and after["answers"] == before["answers"] + 10


def test_prompts_run_whole_when_plans_are_off(
    make: Callable[..., Any], reference: Reference
) -> None:
    llm = make("copy", {"prompt": {"exit": 3, "tail": 1}, "canary": NEVER})
    prompts = [prompt for prompt in random_prompts(6, 20) if len(prompt) > 10][:11]
    run(llm, prompts[:10])
    assert drain(llm)["off"]
    whole = reference.generate(prompts[10], [], TOKENS)[0]
    assert run(llm, [prompts[10]]) == [whole]


def test_readings_wait_while_requests_do_and_nothing_is_lost_in_preemption(
    make: Callable[..., Any], reference: Reference
) -> None:
    llm = make("copy", {**STATIC, "canary": ALL}, num_gpu_blocks_override=9)
    prompts = [[at, *prompt] for at, prompt in enumerate(random_prompts(7, 8, longest=40))]
    found = run(llm, prompts, max_tokens=40)
    assert found == [reference.generate(prompt, PLAN, 40, kv_fill="copy")[0] for prompt in prompts]
    report = drain(llm)
    assert report["answers"] + report["dropped"] == 8
    read = [gaps(reference, *pair) for pair in zip(prompts, found, strict=True)]
    if not report["dropped"]:
        assert report["surprise"][0] == pytest.approx(fmean(map(fmean, read)), abs=1e-3)


def test_clients_cannot_write_what_the_scheduler_writes(make: Callable[..., Any]) -> None:
    llm = make("copy", {**STATIC, "canary": ALL})
    for key, value in [("_adaskip_level", 7), ("_adaskip_canary", {}), ("_adaskip_adapter", "a")]:
        with pytest.raises(
            VLLMValidationError, match="unknown argument; allowed: adaskip, adaskip_skip"
        ):
            run(llm, [[1, 2]], [{key: value}])
