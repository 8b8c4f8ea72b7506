# SPDX-License-Identifier: Apache-2.0
"""Meaning: prompt at full depth, each generated token through exactly its plan.

Fails when `Step.of` counts a prompt token as generated, `Step.part` gives a sub-layer to
a wrong row, a part's metadata or positions are another row's, or the residual is not
scattered back (each was tried, see docs/testing.md).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from conftest import TINY_LAYERS
from helpers.batches import Entries, greedy, random_plan, random_prompts, sampling
from helpers.reference import Reference

from vllm_adaskip import engine_args

#: Whole layers and single sub-layers, first and last layer included, one by one.
SINGLES: list[Entries] = [
    *([layer] for layer in range(TINY_LAYERS)),
    *([f"{kind}:{layer}"] for kind in ("attn", "mlp") for layer in range(TINY_LAYERS)),
]
#: Almost nothing left, all of one kind left out, both ends, everything but one end.
EXTREMES: list[Entries] = [
    [],
    [0, TINY_LAYERS - 1],
    list(range(1, TINY_LAYERS)),
    list(range(TINY_LAYERS - 1)),
    [*range(TINY_LAYERS - 1), f"attn:{TINY_LAYERS - 1}"],
    [*range(1, TINY_LAYERS), "mlp:0"],
    [*range(1, TINY_LAYERS), "attn:0"],
    [f"attn:{layer}" for layer in range(TINY_LAYERS)],
    [f"mlp:{layer}" for layer in range(TINY_LAYERS)],
]


@pytest.fixture(scope="module")
def llm(engine: Callable[..., Any], tiny_llama: str) -> Any:
    """Chunked prefill: prompts of up to 90 tokens, 48 tokens a step."""
    return engine(tiny_llama, max_num_batched_tokens=48, **engine_args())


def check(
    reference: Reference, prompts: list[list[int]], plans: list[Entries], got: list[list[int]]
) -> None:
    for prompt, plan, tokens in zip(prompts, plans, got, strict=True):
        want, gap = reference.generate(prompt, plan, len(tokens))
        assert tokens == want, f"plan {plan}, prompt of {len(prompt)}, smallest gap {gap:.2g}"


@pytest.mark.parametrize("plans", [SINGLES, EXTREMES], ids=["singles", "extremes"])
def test_a_mixed_batch_gives_the_tokens_of_the_reference(
    llm: Any, reference: Reference, plans: list[Entries]
) -> None:
    prompts = random_prompts(1, len(plans))
    check(reference, prompts, plans, greedy(llm, prompts, plans))


@pytest.mark.parametrize("seed", range(3))
def test_random_plans_in_one_batch(llm: Any, reference: Reference, seed: int) -> None:
    rng = random.Random(seed)
    plans = [random_plan(rng, TINY_LAYERS) for _ in range(24)]
    prompts = random_prompts(seed + 10, len(plans))
    check(reference, prompts, plans, greedy(llm, prompts, plans))


def test_everybody_the_same_plan(llm: Any, reference: Reference) -> None:
    prompts = random_prompts(2, 6)
    plans: list[Entries] = [[2, 3, "attn:5"]] * 6
    check(reference, prompts, plans, greedy(llm, prompts, plans))


def test_sequences_join_leave_and_are_aborted_at_any_step(llm: Any, reference: Reference) -> None:
    rng = random.Random(5)
    count = 40
    prompts = random_prompts(6, count)
    plans = [random_plan(rng, TINY_LAYERS) for _ in range(count)]
    lengths = [rng.randint(1, 20) for _ in range(count)]
    aborted = set(rng.sample(range(count), 12))
    core = llm.llm_engine
    waiting, finished = list(range(count)), {}
    while waiting or core.has_unfinished_requests():
        for _ in range(rng.randint(0, 3)):
            if waiting:
                index = waiting.pop()
                core.add_request(
                    str(index),
                    {"prompt_token_ids": prompts[index]},
                    sampling(plans[index], lengths[index]),
                )
        for output in core.step():
            if output.finished:
                finished[int(output.request_id)] = list(output.outputs[0].token_ids)
        if aborted and rng.random() < 0.3:
            core.abort_request([str(aborted.pop())])
    assert len(finished) >= count - 12
    for index, tokens in finished.items():
        check(reference, [prompts[index]], [plans[index]], [tokens])


def test_parallel_samples_follow_the_plan_of_their_request(llm: Any, reference: Reference) -> None:
    prompts = random_prompts(8, 3)
    plans: list[Entries] = [[1, 2], ["mlp:4"], []]
    # n > 1 needs sampling; the smallest top_p leaves the greedy token alone.
    several = [sampling(plan, 12, n=3, temperature=1.0, top_k=1) for plan in plans]
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], several, use_tqdm=False
    )
    for prompt, plan, output in zip(prompts, plans, outputs, strict=True):
        samples = [list(one.token_ids) for one in output.outputs]
        assert len(samples) == 3
        check(reference, [prompt] * 3, [plan] * 3, samples)


def test_a_preempted_request_resumes_under_its_plan(
    engine: Callable[..., Any], tiny_llama: str, reference: Reference
) -> None:
    tight = engine(
        tiny_llama,
        block_size=32,
        num_gpu_blocks_override=12,
        disable_log_stats=False,
        **engine_args(),
    )
    prompts = random_prompts(9, 8, longest=40)
    rng = random.Random(9)
    plans = [random_plan(rng, TINY_LAYERS) for _ in prompts]
    check(reference, prompts, plans, greedy(tight, prompts, plans, max_tokens=80))
    counters = {
        metric.name: metric.value for metric in tight.get_metrics() if hasattr(metric, "value")
    }
    assert counters["vllm:num_preemptions"] > 0
