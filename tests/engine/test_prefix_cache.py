# SPDX-License-Identifier: Apache-2.0
"""Clean cache: nobody reads K/V that was written under somebody else's plan.

Fails when `MarkingScheduler` is not named in the engine's config (stock hashes: later
requests get wrong tokens), when the mark leaves out the plan or the prompt's length, and
when a block with holes keeps its hash.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from conftest import TINY_LAYERS
from helpers.batches import Entries, greedy, random_plan, sampling, small_blocks
from helpers.reference import Reference

BLOCK = 32
KV_FILLS = ["none", "copy", "project"]


@pytest.fixture(scope="module")
def make(engine: Callable[..., Any], tiny_llama: str) -> Callable[..., Any]:
    return small_blocks(engine, tiny_llama, BLOCK)


def prompt_of(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(512) for _ in range(length)]


def run(llm: Any, prompt: list[int], plan: Entries, tokens: int = 24) -> tuple[list[int], int]:
    """Return the greedy tokens of one request, and how many prompt tokens the cache had."""
    (output,) = llm.generate({"prompt_token_ids": prompt}, sampling(plan, tokens), use_tqdm=False)
    return list(output.outputs[0].token_ids), output.num_cached_tokens


@pytest.mark.parametrize("kv_fill", KV_FILLS)
def test_conversations_that_go_on_under_other_plans(
    make: Callable[..., Any], reference: Reference, kv_fill: str
) -> None:
    """Every answer becomes part of later prompts; all equal engines that never saw a plan."""
    llm = make(kv_fill)
    rng = random.Random(21)
    plans: list[Entries] = [[], [2, 3], ["attn:5"], ["mlp:4", "mlp:5"], [0]]
    for first in plans[1:]:
        prompt = prompt_of(rng, rng.choice([31, 32, 33, 40, 64]))
        answer, _ = run(llm, prompt, first, 48)
        for later in plans:
            going_on = [*prompt, *answer, *prompt_of(rng, 7)]
            tokens, cached = run(llm, going_on, later, 12)
            assert tokens == reference.generate(going_on, later, 12)[0], (first, later)
            # The first to go on finds the prompt's own blocks; the others find also those
            # that it computed of the answer, densely.
            whole = (len(prompt) if later == [] else len(prompt) + len(answer)) // BLOCK * BLOCK
            assert cached == whole, (first, later)


@pytest.mark.parametrize("kv_fill", KV_FILLS)
def test_what_was_prompt_and_what_was_generated_is_told_apart(
    make: Callable[..., Any], reference: Reference, kv_fill: str
) -> None:
    """The same plan and the same tokens, but some of them as prompt: other K/V."""
    llm = make(kv_fill)
    plan: Entries = ["mlp:2", "mlp:3"]
    prompt = prompt_of(random.Random(22), 20)
    answer, _ = run(llm, prompt, plan, 60)
    for taken in (5, 12, 40, 59):
        longer = prompt + answer[:taken]
        tokens, _ = run(llm, longer, plan, 20)
        assert tokens == reference.generate(longer, plan, 20)[0]


def test_prompts_are_shared_whatever_the_plan(make: Callable[..., Any]) -> None:
    llm = make("none")
    prompt = prompt_of(random.Random(23), 100)
    plans: list[Entries] = [[2, 3], [], ["attn:5"], [2, 3]]
    assert [run(llm, prompt, plan, 4)[1] for plan in plans] == [0, 96, 96, 96]


def test_dense_answers_stay_shared_as_in_stock_vllm(make: Callable[..., Any]) -> None:
    llm = make("none")
    prompt = prompt_of(random.Random(24), 40)
    answer, _ = run(llm, prompt, [], 60)
    assert run(llm, [*prompt, *answer], [2], 2)[1] == 96


@pytest.mark.parametrize(
    ("kv_fill", "plan", "finds"),
    [
        ("none", [2, 3], False),
        ("none", ["mlp:2"], True),
        ("copy", [2, 3], True),
        ("copy", [f"attn:{layer}" for layer in range(TINY_LAYERS)], False),
        ("project", [2, 3], True),
    ],
)
def test_a_preempted_sequence_finds_its_own_blocks_unless_they_have_holes(
    make: Callable[..., Any], reference: Reference, kv_fill: str, plan: Entries, finds: bool
) -> None:
    llm = make(kv_fill)
    core = llm.llm_engine
    scheduler = core.engine_core.engine_core.scheduler
    prompt = prompt_of(random.Random(25), 40)
    core.add_request("one", {"prompt_token_ids": prompt}, sampling(plan, 100))
    for _ in range(70):
        core.step()
    (request,) = scheduler.running
    before = list(request.block_hashes)
    assert len(before) == 3 and scheduler.is_lasting(request) is finds
    scheduler.running.remove(request)
    scheduler._preempt_request(request, 0.0)  # puts it at the head of the queue
    scheduler.prev_step_scheduled_req_ids.clear()
    assert (request.block_hashes == before) is finds
    assert request.block_hashes[0] == before[0]
    hits = scheduler.kv_cache_manager.get_computed_blocks(request)[1]
    assert hits == (96 if finds else 32)
    tokens: list[int] = []
    while core.has_unfinished_requests():
        for output in core.step():
            tokens = list(output.outputs[0].token_ids)
    assert tokens == reference.generate(prompt, plan, 100)[0]


@pytest.mark.parametrize("kv_fill", KV_FILLS)
def test_preempted_sequences_among_shared_prompts(
    make: Callable[..., Any], reference: Reference, kv_fill: str
) -> None:
    """vLLM itself preempts, in a cache of 12 blocks."""
    llm = make(kv_fill, num_gpu_blocks_override=12)
    rng = random.Random(26)
    beginnings = [prompt_of(rng, 40) for _ in range(2)]
    prompts = [[*rng.choice(beginnings), *prompt_of(rng, 5)] for _ in range(8)]
    plans: list[Entries] = [random_plan(rng, TINY_LAYERS) for _ in prompts]
    plans[:2] = [[], ["mlp:3"]]
    got = greedy(llm, prompts, plans, max_tokens=80)
    for prompt, plan, tokens in zip(prompts, plans, got, strict=True):
        assert tokens == reference.generate(prompt, plan, 80)[0]
    counters = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    assert counters["vllm:num_preemptions"] > 0 and counters["vllm:prefix_cache_hits"] > 0
