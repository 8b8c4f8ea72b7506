# SPDX-License-Identifier: Apache-2.0
"""Everything at once: hypothesis drives engines whose cache is far too small, and all is judged.

Guards what a serving engine does to a sequence whose plan leaves holes in its K/V:
preemption and replay of generated tokens under their plan, the prefix cache (prompts shared
by all, blocks with generated tokens kept apart by plan), chunked prefill, parallel samples,
stop strings and stop tokens, aborts, refusals, and rows of the sequence table that are left
behind. Each way to fill the K/V of skipped sub-layers has its engine.

Fails (each was tried) when blocks with generated tokens of a planned sequence carry no mark in
the prefix cache, or one without the plan, or one without the prompt's length; when tokens that
are computed again after preemption count as prompt; when `copy` writes into other slots; and
when rows that vLLM removes stay in the table.

`soak.py` is the same for as long as one likes.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from helpers.batches import Entries, PromptPlan, random_plan, random_prompts
from helpers.reference import Reference
from hypothesis.stateful import run_state_machine_as_test
from torture.engines import ENGINES, LAYERS, VOCABULARY, engine_options, write_model
from torture.judge import Judge
from torture.machine import examples, machine
from torture.traffic import Request, Traffic


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("torture") / "model")


@pytest.fixture(scope="module")
def judge(model: str) -> Judge:
    return Judge(model)


@pytest.mark.parametrize("kv_fill", ENGINES)
def test_every_output_is_that_of_the_reference(
    engine: Callable[..., Any], model: str, judge: Judge, kv_fill: str
) -> None:
    traffic = Traffic(engine(model, **engine_options(kv_fill)), judge)
    run_state_machine_as_test(machine(traffic), settings=examples(12, 40))
    tally = traffic.tally
    print(kv_fill, tally)
    assert tally.mismatches == 0
    assert tally.finished >= 300
    assert min(tally.planned, tally.dense, tally.shortened, tally.stopped) >= 50
    assert min(tally.aborted, tally.refused) > 0
    assert tally.preemptions >= 24
    assert tally.prefix_hit_tokens >= 5000


def test_the_judge_agrees_with_the_plain_loop(judge: Judge, model: str) -> None:
    reference, rng = Reference(model), random.Random(1)
    for prompt in random_prompts(1, 12, vocabulary=VOCABULARY):
        plan, read = random_plan(rng, LAYERS), rng.choice([None, ([5, 6, "attn:2"], 3)])
        tokens, gap = reference.generate(prompt, plan, 24, prompt_plan=read)
        logits = judge.logits(prompt, plan, tokens, read)
        assert logits.argmax(-1).tolist() == tokens, f"smallest gap {gap:.2g}"


#: Two plans that differ in one sub-layer only, and a dense one.
WRONG: list[Entries] = [[2, "attn:4", "mlp:6"], [2, "mlp:5"], []]


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_the_judge_sees_what_is_wrong(
    engine: Callable[..., Any], model: str, judge: Judge, sampled: bool
) -> None:
    """Else the run above would prove nothing."""
    traffic = Traffic(engine(model, **engine_options("none")), judge)
    plan: Entries = [2, "attn:4", "mlp:5"]
    prompt = random_prompts(3, 1, vocabulary=VOCABULARY)[0]
    read: PromptPlan = [5, "attn:2"], 3
    request = Request(prompt, plan, max_tokens=20, logprobs=True, sampled=sampled, prompt_plan=read)
    [output] = traffic.llm.generate({"prompt_token_ids": prompt}, request.params(), use_tqdm=False)
    [answer] = output.outputs
    assert not list(judge.faults(request, answer))
    for wrong in WRONG:
        assert list(judge.faults(replace(request, plan=wrong), answer))
        # Without log-probabilities the tokens alone must tell.
        if not sampled:
            assert list(judge.faults(replace(request, plan=wrong, logprobs=False), answer))
    for other in (None, ([5, "attn:2"], 4), ([5], 3)):
        assert list(judge.faults(replace(request, prompt_plan=other), answer))
    assert list(judge.faults(replace(request, prompt=[*prompt[:-1], 7]), answer))
    assert list(judge.faults(replace(request, max_tokens=19), answer))
    assert list(judge.faults(replace(request, max_tokens=21), answer))
    assert list(judge.faults(replace(request, stop=[answer.text[9:12]]), answer))
    assert list(judge.faults(replace(request, stop_token_ids=[answer.token_ids[4]]), answer))
    answer.text += " x"
    assert list(judge.faults(request, answer))
