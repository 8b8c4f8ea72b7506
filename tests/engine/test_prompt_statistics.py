# SPDX-License-Identifier: Apache-2.0
"""Purity: a plan that is decided from the prompt depends on nothing but the prompt.

The same prompts arrive whole, in chunks, half from the prefix cache, several times at once
and again after preemption; their plans must be those that the same method decides from the
float32 transformers model, and their tokens those of the loop under these plans. Fails when
blocks are not reset, when a chunk's tokens are added twice or not at all, when generated
tokens are observed, when cached blocks bring no statistics, and when dense generated blocks
are shared under a method that reads prompts.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from conftest import TINY_SHAPE
from helpers.batches import greedy, random_prompts, sampling
from helpers.profiles import write_first
from helpers.reference import Reference

from vllm_adaskip import DecoderShape, SkipPlan, engine_args
from vllm_adaskip.config import AdaSkipConfig
from vllm_adaskip.engine.decide import _digest
from vllm_adaskip.engine.request import Planner

BUDGET = 0.6
#: A smaller one, that all methods can meet.
LESS = 0.45
#: What is read of a prompt: means of all sub-layers,
#: means of MLPs against a threshold, votes of all tokens, the last token alone.
METHODS: dict[str, dict[str, Any]] = {
    "adaskip": {},
    "ffn-skip": {"threshold": 0.94, "keep_last": 0, "max_compute": 0.8},
    "first, fraction": {"reduce": "fraction"},
    "first, last": {"reduce": "last", "width": 8, "codebook": [[2, 3, 5], [4, 5], [1, 4, 6], [3]]},
}


class Method:
    """One of `METHODS`: the server's options, and its plans by the float32 reference."""

    def __init__(self, options: dict[str, Any], reference: Reference) -> None:
        self.options = options
        self.reference = reference
        facts = AdaSkipConfig.parse(options).facts(DecoderShape(*TINY_SHAPE))
        self._classifier = Planner(facts).classifier

    def plan(self, prompt: list[int]) -> SkipPlan:
        read = self.reference.observe(prompt, self._classifier)
        return self._classifier.decide(self.options["max_compute"], read)

    def want(
        self, prompt: list[int], tokens: int, budget: float | None = None
    ) -> tuple[list[int], SkipPlan]:
        """Return a sequence's tokens and plan."""
        read = self.reference.observe(prompt, self._classifier)
        plan = self._classifier.decide(budget or self.options["max_compute"], read)
        return self.reference.generate(prompt, plan.entries(), tokens)[0], plan

    def check(self, llm: Any, prompts: list[list[int]], tokens: int = 12) -> None:
        """Run a batch; compare plans and tokens with the reference's."""
        got = greedy(llm, prompts, [None] * len(prompts), max_tokens=tokens)
        decisions = decided(llm)
        for prompt, output in zip(prompts, got, strict=True):
            want, plan = self.want(prompt, tokens)
            assert decisions[_digest(prompt)] == plan
            assert output == want


@pytest.fixture(scope="module", params=METHODS)
def method(
    request: pytest.FixtureRequest, tiny_llama: str, tmp_path_factory: pytest.TempPathFactory
) -> Method:
    options = {"method": request.param.partition(",")[0], **METHODS[request.param]}
    if request.param.startswith("first"):
        folder = tmp_path_factory.mktemp("profile")
        options = {"profile": write_first(folder, tiny_llama, **METHODS[request.param])}
    return Method({"max_compute": BUDGET, **options}, Reference(tiny_llama))


@pytest.fixture(scope="module")
def make(engine: Callable[..., Any], tiny_llama: str, method: Method) -> Callable[..., Any]:
    def make(**options: Any) -> Any:
        options = {"disable_log_stats": False, "block_size": 32, **options}
        return engine(tiny_llama, **options, **engine_args(**method.options))

    return make


def decided(llm: Any) -> dict[bytes, SkipPlan]:
    """Every decision of the engine's worker so far, by digest of the prompt."""
    memo = llm.apply_model(lambda model: model.adaskip.state.memo)[0]
    return {undecided.prompt_hash: decision for undecided, decision in memo.items()}


def forget(llm: Any) -> None:
    llm.apply_model(lambda model: model.adaskip.state.memo.clear())


def test_in_one_piece_and_in_chunks(make: Callable[..., Any], method: Method) -> None:
    prompts = random_prompts(31, 10, longest=200) + random_prompts(38, 10, longest=4)
    for chunk in (256, 48, 19):
        method.check(make(max_num_batched_tokens=chunk), prompts)
    whole = {method.plan(prompt) for prompt in prompts}
    assert len(whole) > 3  # the prompt does decide


def test_generated_tokens_are_not_observed(make: Callable[..., Any]) -> None:
    """Also not those that are decoded beside other sequences' prompts."""
    llm = make(max_num_batched_tokens=24)
    prompts = random_prompts(39, 8, longest=60)
    greedy(llm, prompts, [None] * len(prompts), max_tokens=10)
    sums = llm.apply_model(lambda model: model.adaskip.reader.statistics.sums)[0]
    assert sums[:, -1].sum() == sum(map(len, prompts))


def test_from_the_prefix_cache(make: Callable[..., Any], method: Method) -> None:
    """Blocks were observed under another request, dense or planned, or by a longer prompt."""
    llm = make(max_num_batched_tokens=48)
    rng = random.Random(32)
    beginning = random_prompts(32, 1, longest=1)[0] * 100
    beginning = [rng.randrange(512) for _ in beginning]
    dense = sampling(None, 4, extra_args={"adaskip": "off"})
    llm.generate({"prompt_token_ids": [*beginning, 1]}, dense, use_tqdm=False)
    method.check(llm, [[*beginning, *end] for end in random_prompts(33, 6, longest=30)])
    method.check(llm, [beginning[:97], beginning[:64], beginning[:96]])
    forget(llm)  # now from blocks alone
    method.check(llm, [beginning, [*beginning, 7]])
    counters = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    assert counters["vllm:prefix_cache_hits"] >= 96 * 8


@pytest.mark.parametrize("arguments", [{"adaskip": "off"}, None])
def test_answers_that_become_prompts(
    make: Callable[..., Any], method: Method, arguments: dict[str, Any] | None
) -> None:
    """Generated tokens were not observed, so as prompt they are computed again."""
    llm = make()
    rng = random.Random(34)
    prompt = [rng.randrange(512) for _ in range(40)]
    params = sampling(None, 70, extra_args=arguments)
    (output,) = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
    method.check(llm, [[*prompt, *output.outputs[0].token_ids, 5, 6]])


def test_again_after_preemption(make: Callable[..., Any], method: Method) -> None:
    llm = make(num_gpu_blocks_override=12)
    method.check(llm, random_prompts(35, 8, longest=40), tokens=80)
    counters = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    assert counters["vllm:num_preemptions"] > 0


def test_with_parallel_samples_budgets_and_dense_requests(
    make: Callable[..., Any], method: Method
) -> None:
    llm = make(max_num_batched_tokens=48)
    prompt = random_prompts(36, 1, longest=90)[0]
    arguments: list[tuple[dict[str, Any] | None, list[int]]] = [
        (None, method.want(prompt, 12)[0]),
        ({"adaskip_max_compute": LESS}, method.want(prompt, 12, LESS)[0]),
        ({"adaskip": "off"}, method.reference.generate(prompt, [], 12)[0]),
        ({"adaskip_skip": [3]}, method.reference.generate(prompt, [3], 12)[0]),
    ]
    outputs = llm.generate(
        [{"prompt_token_ids": prompt}] * len(arguments),
        [sampling(None, 12, n=2, temperature=1.0, top_k=1, extra_args=one) for one, _ in arguments],
        use_tqdm=False,
    )
    for output, (_, want) in zip(outputs, arguments, strict=True):
        assert [list(one.token_ids) for one in output.outputs] == [want] * 2


def test_aborted_in_the_middle_of_its_prompt(make: Callable[..., Any], method: Method) -> None:
    """Its half-filled blocks go to others, who must not find its statistics in them."""
    llm = make(max_num_batched_tokens=24, num_gpu_blocks_override=12)
    core = llm.llm_engine
    rng = random.Random(37)
    for number in range(6):
        prompt = [rng.randrange(512) for _ in range(150)]
        core.add_request(str(number), {"prompt_token_ids": prompt}, sampling(None, 4))
        for _ in range(rng.randint(1, 4)):
            core.step()
        core.abort_request([str(number)])
        method.check(llm, random_prompts(40 + number, 3, longest=120), tokens=4)
