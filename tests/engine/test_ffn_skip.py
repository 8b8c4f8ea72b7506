# SPDX-License-Identifier: Apache-2.0
"""Method ``ffn-skip`` token by token: each generated token leaves out what the paper's rule says.

The rule is written down once more, plainly, in `reference.MlpRule`. Fails when prompt or warm-up
tokens are gated, when ages are counted from a wrong place (preemption), when rows are
measured or scattered at another's place, and when blocks with gated tokens are found by others.

Scope ``sequence`` is one of the methods of `test_prompt_statistics`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from conftest import TINY_LAYERS, TINY_SHAPE
from helpers.batches import random_plan, random_prompts, sampling
from helpers.gated import (
    ALWAYS,
    BLOCK,
    MIDDLE,
    NEVER,
    THRESHOLDS,
    Arguments,
    Gated,
    maker,
    mlps,
    varied,
)

from vllm_adaskip import DecoderShape


@pytest.fixture(scope="module")
def make(engine: Callable[..., Any], tiny_llama: str) -> Callable[..., Gated]:
    return maker(engine, tiny_llama)


CHUNKED = {"max_num_batched_tokens": 48}


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("max_skip", [None, 2])
def test_gated_planned_and_dense_requests_in_one_batch(
    make: Callable[..., Gated], threshold: float, max_skip: int | None
) -> None:
    """Prompts come in chunks beside tokens that are decoded."""
    gated = make(threshold, max_skip=max_skip, engine_options=CHUNKED)
    rng = random.Random(60)
    prompts = random_prompts(60, 16)
    arguments: list[Arguments] = [None] * 8
    arguments += [{"adaskip": "off"}, {"adaskip_skip": []}]
    arguments += [{"adaskip_skip": random_plan(rng, TINY_LAYERS)} for _ in range(6)]
    rng.shuffle(arguments)
    rules = gated.check(prompts, arguments)
    if threshold in (NEVER, ALWAYS):
        assert varied(rules) == (1 if threshold == NEVER else 2)  # with the warm-up's nothing
    else:
        assert varied(rules) >= 4


def test_never_is_dense_and_always_begins_after_the_first_of_the_middle(
    make: Callable[..., Gated],
) -> None:
    prompts = random_prompts(61, 6)
    never = make(NEVER, warm_up=0).run(prompts, [None] * 6, 20)
    dense = make(NEVER, warm_up=0).run(prompts, [{"adaskip": "off"}] * 6, 20)
    assert never == dense
    for max_skip, left_out in ((None, MIDDLE[1:]), (3, MIDDLE[1:4]), (1, MIDDLE[1:2])):
        plan = [f"mlp:{layer}" for layer in left_out]
        gated = make(ALWAYS, warm_up=0, max_skip=max_skip)
        always = gated.run(prompts, [None] * 6, 20)
        assert always == gated.run(prompts, [{"adaskip_skip": plan}] * 6, 20)
        assert always != never


def test_in_bfloat16(make: Callable[..., Gated]) -> None:
    """Where the gate's own numbers are float32 all the same."""
    prompts = random_prompts(72, 6)
    plan = [f"mlp:{layer}" for layer in MIDDLE[1:]]
    gated = make(ALWAYS, warm_up=0, engine_options={"dtype": "bfloat16"})
    always = gated.run(prompts, [None] * 6, 20)
    assert always == gated.run(prompts, [{"adaskip_skip": plan}] * 6, 20)


def test_a_sequence_does_not_notice_its_neighbours(make: Callable[..., Gated]) -> None:
    gated = make()
    prompts = random_prompts(62, 12)
    together = gated.run(prompts, [None] * 12, 20)
    assert together == [gated.run([prompt], [None], 20)[0] for prompt in prompts]


@pytest.mark.parametrize("warm_up", [0, 1, 30])
def test_warm_up_counts_the_generated_tokens_of_each_sequence(
    make: Callable[..., Gated], warm_up: int
) -> None:
    gated = make(0.8, warm_up=warm_up)
    rules = gated.check(random_prompts(63, 4), [None] * 4, tokens=34)
    for rule in rules:
        first = next(age for age, left_out in enumerate(rule.left_out) if left_out)
        assert first == warm_up


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("chunk", [256, 24])
def test_again_after_preemption(
    make: Callable[..., Gated], prefix_caching: bool, chunk: int
) -> None:
    """Without prefix caching whole answers are replayed beside their prompts, also in chunks."""
    gated = make(
        warm_up=30,
        engine_options={
            "num_gpu_blocks_override": 12,
            "max_num_batched_tokens": chunk,
            "enable_prefix_caching": prefix_caching,
        },
    )
    arguments: list[Arguments] = [None] * 6 + [{"adaskip": "off"}, {"adaskip_skip": [2, "mlp:4"]}]
    rules = gated.check(random_prompts(64, 8, longest=40), arguments, 80, replayed=True)
    assert varied(rules) >= 4
    counters = {metric.name: getattr(metric, "value", 0) for metric in gated.llm.get_metrics()}
    assert counters["vllm:num_preemptions"] > 0


def test_parallel_samples_are_gated_each_by_itself(make: Callable[..., Gated]) -> None:
    gated = make()
    prompts = random_prompts(65, 3)
    params = sampling(None, 16, n=3, temperature=1.0, top_k=1)
    outputs = gated.llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
    )
    for prompt, output in zip(prompts, outputs, strict=True):
        want, _, _ = gated.want(prompt, None, 16)
        assert [list(one.token_ids) for one in output.outputs] == [want] * 3


def cached(gated: Gated, prompt: list[int], arguments: Arguments, tokens: int = 4) -> int:
    """How many prompt tokens of a request the prefix cache had; its tokens are checked."""
    (output,) = gated.llm.generate(
        {"prompt_token_ids": prompt}, sampling(None, tokens, extra_args=arguments), use_tqdm=False
    )
    assert list(output.outputs[0].token_ids) == gated.want(prompt, arguments, tokens)[0]
    found: int = output.num_cached_tokens
    return found


@pytest.mark.parametrize("later", [None, {"adaskip": "off"}, {"adaskip_skip": ["mlp:3"]}])
def test_gated_answers_are_found_by_nobody_and_prompts_by_all(
    make: Callable[..., Gated], later: Arguments
) -> None:
    """Warm-up tokens included: an answer that comes back as prompt is computed again."""
    gated = make(0.8)
    prompt = [random.Random(66).randrange(512) for _ in range(40)]
    (answer,) = gated.run([prompt], [None], 70)
    assert cached(gated, prompt, later) == BLOCK
    assert cached(gated, [*prompt, *answer, 5, 6], later) == BLOCK
    assert cached(gated, [*prompt, *answer, 7], None) == (40 + 70) // BLOCK * BLOCK


def test_dense_answers_stay_shared(make: Callable[..., Gated]) -> None:
    """The method reads no prompts, so nothing is missing in their blocks."""
    gated = make(0.8)
    prompt = [random.Random(67).randrange(512) for _ in range(40)]
    (answer,) = gated.run([prompt], [{"adaskip": "off"}], 70)
    assert cached(gated, [*prompt, *answer, 5], None) == 96


def test_a_preempted_sequence_finds_its_own_blocks(make: Callable[..., Gated]) -> None:
    """Attention always runs, so they have no holes."""
    gated = make(0.8)
    core = gated.llm.llm_engine
    scheduler = core.engine_core.engine_core.scheduler
    prompt = [random.Random(68).randrange(512) for _ in range(40)]
    core.add_request("one", {"prompt_token_ids": prompt}, sampling(None, 100))
    for _ in range(70):
        core.step()
    (request,) = scheduler.running
    scheduler.running.remove(request)
    scheduler._preempt_request(request, 0.0)  # puts it at the head of the queue
    scheduler.prev_step_scheduled_req_ids.clear()
    assert scheduler.kv_cache_manager.get_computed_blocks(request)[1] == 96
    tokens: list[int] = []
    while core.has_unfinished_requests():
        for output in core.step():
            tokens = list(output.outputs[0].token_ids)
    assert tokens == gated.want(prompt, None, 100)[0]


@pytest.mark.parametrize("threshold", [NEVER, 0.9, ALWAYS])
def test_a_budget_holds_for_every_token(make: Callable[..., Gated], threshold: float) -> None:
    """The plan that meets it is followed from the first token on, and the gate adds to it."""
    gated = make(threshold, max_skip=4)
    arguments: list[Arguments] = [{"adaskip_max_compute": share} for share in (0.95, 0.8, 0.7)] * 3
    arguments += [None] * 3
    rules = gated.check(random_prompts(69, 12), arguments)
    for one, rule in zip(arguments, rules, strict=True):
        plan = gated.want([1], one, 1)[1]
        share = (one or {}).get("adaskip_max_compute", 1.0)
        assert plan.share(DecoderShape(*TINY_SHAPE)) <= share
        assert all(len(left_out) + len(mlps(plan)) <= 4 for left_out in rule.left_out)


def test_an_mlp_that_nobody_needs_is_not_launched(make: Callable[..., Gated]) -> None:
    """By what vLLM's own modules are called with."""
    gated = make(ALWAYS, warm_up=2, max_skip=3)
    rows: Counter[tuple[int, int]] = Counter()

    def watch(model: Any) -> list[Any]:
        def hook(layer: int) -> Callable[..., None]:
            return lambda module, args, output: rows.update([(layer, len(output))])

        return [
            layer.mlp.register_forward_hook(hook(index))
            for index, layer in enumerate(model.model.layers)
        ]

    handles = gated.llm.apply_model(watch)[0]
    # Two of three are gated, in the last 3 of 5 steps; the first token comes from the prompt.
    gated.run([[1, 2], [3, 4], [5, 6]], [None, {"adaskip": "off"}, None], 6)
    assert [rows[layer, 3] for layer in range(TINY_LAYERS)] == [5, 5, 2, 2, 2, 5, 5, 5]
    assert [rows[layer, 1] for layer in range(TINY_LAYERS)] == [0, 0, 3, 3, 3, 0, 0, 0]
    rows.clear()
    gated.run([[1, 2], [3, 4]], [None] * 2, 6)
    assert [rows[layer, 2] for layer in range(TINY_LAYERS)] == [5, 5, 2, 2, 2, 5, 5, 5]
    for handle in handles:
        handle.remove()


def test_plans_are_known_of_requests_that_have_one(make: Callable[..., Gated]) -> None:
    requests: list[tuple[Arguments, list[int]]] = [
        (None, [1, 2]),
        ({"adaskip_max_compute": 0.8}, [1, 2]),
        ({"adaskip": "off"}, [1, 2]),
        ({"adaskip_skip": [3]}, [1, 2]),
    ]
    (plans,) = make().llm.collective_rpc("adaskip_plans", args=(requests,))
    assert plans == [None, None, [], [3]]


@pytest.mark.parametrize("kv_fill", ["copy", "project"])
def test_beside_fills(make: Callable[..., Gated], kv_fill: str) -> None:
    gated = make(kv_fill=kv_fill)
    arguments: list[Arguments] = [None] * 4 + [{"adaskip_skip": [2, "attn:5"]}] * 4
    prompts = random_prompts(70, 8)
    got = gated.run(prompts, arguments, 16)
    for prompt, one, tokens in zip(prompts, arguments, got, strict=True):
        assert tokens == gated.want(prompt, one, 16)[0]  # a plan that stays reads no fills


def test_compiled(make: Callable[..., Gated]) -> None:
    gated = make(warm_up=4, engine_options={"enforce_eager": False})
    arguments: list[Arguments] = [None] * 5 + [{"adaskip": "off"}, {"adaskip_skip": ["mlp:2"]}]
    gated.check(random_prompts(71, 7), arguments, 12)
