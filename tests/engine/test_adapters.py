# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters of requests beside plans: each row keeps its own, whichever rows run a sub-layer.

Each answer is that of the float32 loop with the adapter merged into the weights.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY_LAYERS
from helpers import adapters
from helpers.batches import Entries, logprobs_of, random_plan, random_prompts, sampling
from helpers.families import CASES, LAYERS, Matrix
from helpers.reference import Reference

from vllm_adaskip import engine_args
from vllm_adaskip.support import UNADAPTED

TOKENS = 12
#: One fewer than there are places: where all are taken, vLLM on the CPU runs a request without
#: adapter with the last place's.
COUNT = 3
LORA: dict[str, Any] = {"enable_lora": True, "max_lora_rank": 8, "max_loras": COUNT + 1}
PLANS: list[Entries] = [[], [2, 3], ["attn:4", "mlp:5"], ["attn:1", "attn:6"]]
#: Family -> a case of it.
ADAPTED = {
    case.architecture: name for name, case in CASES.items() if case.architecture not in UNADAPTED
}
#: None: a request without.
WHOSE: list[int | None] = [None, *range(COUNT)]


class Adapted:
    """A checkpoint's adapters, engines that take them, and the merged references."""

    def __init__(
        self, model: str, folder: Path, engine: Callable[..., Any], **options: Any
    ) -> None:
        self.model, self._engine, self._options = model, engine, options
        self.paths = adapters.write(model, folder, COUNT)
        self.reference = cache(self._reference)
        self.ours = cache(self._ours)

    def _reference(self, whose: int | None) -> Reference:
        return Reference(self.model if whose is None else self.paths[whose][1])

    def start(self, **options: Any) -> Any:
        return self._engine(self.model, **{**LORA, **self._options, **options})

    def _ours(self, kv_fill: str, **options: Any) -> Any:
        return self.start(block_size=32, **options, **engine_args(kv_fill=kv_fill))

    def request(self, whose: int | None) -> Any:
        from vllm.lora.request import LoRARequest

        if whose is None:
            return None
        return LoRARequest(f"adapter {whose}", whose + 1, self.paths[whose][0])

    def run(
        self,
        llm: Any,
        prompts: Sequence[list[int]],
        plans: Sequence[Entries | None],
        whose: Sequence[int | None],
        **more: Any,
    ) -> list[Any]:
        return llm.generate(
            [{"prompt_token_ids": one} for one in prompts],
            [sampling(plan, TOKENS, **more) for plan in plans],
            lora_request=[self.request(one) for one in whose],
            use_tqdm=False,
        )

    def check(
        self,
        llm: Any,
        prompts: Sequence[list[int]],
        plans: Sequence[Entries],
        whose: Sequence[int | None],
        kv_fill: str,
    ) -> list[Any]:
        outputs = self.run(llm, prompts, plans, whose)
        for prompt, plan, one, output in zip(prompts, plans, whose, outputs, strict=True):
            want, gap = self.reference(one).generate(prompt, plan, TOKENS, kv_fill=kv_fill)
            got = list(output.outputs[0].token_ids)
            assert got == want, f"adapter {one}, {plan}, smallest gap {gap:.2g}"
        return outputs


@pytest.fixture(scope="module")
def adapted(
    tiny_llama: str, tmp_path_factory: pytest.TempPathFactory, engine: Callable[..., Any]
) -> Adapted:
    return Adapted(tiny_llama, tmp_path_factory.mktemp("adapters"), engine)


def test_the_adapters_matter(adapted: Adapted) -> None:
    """Otherwise nothing below could fail."""
    (prompt,) = random_prompts(90, 1)
    answers = {tuple(adapted.reference(one).generate(prompt, [], TOKENS)[0]) for one in WHOSE}
    assert len(answers) == len(WHOSE)


def test_nothing_skipped_is_stock_bit_for_bit(adapted: Adapted) -> None:
    prompts = random_prompts(91, 8)
    whose = (WHOSE * 2)[: len(prompts)]

    def logprobs(llm: Any) -> list[Any]:
        ran = adapted.run(llm, prompts, [None] * len(prompts), whose, logprobs=3)
        return logprobs_of(ran)

    assert logprobs(adapted.ours("project")) == logprobs(adapted.start(block_size=32))


@pytest.mark.parametrize("kv_fill", ["copy", "project", "none"])
def test_every_adapter_under_every_plan_in_one_batch(adapted: Adapted, kv_fill: str) -> None:
    plans, whose = zip(*product(PLANS, WHOSE), strict=True)
    adapted.check(adapted.ours(kv_fill), random_prompts(92, len(plans)), plans, whose, kv_fill)


@pytest.mark.parametrize("kv_fill", ["copy", "project"])
def test_random_plans_and_prompts_in_pieces(adapted: Adapted, kv_fill: str) -> None:
    """Prompts come in chunks beside tokens that leave sub-layers out."""
    rng = random.Random(93)
    plans = [random_plan(rng, TINY_LAYERS) for _ in range(14)]
    whose = [rng.choice(WHOSE) for _ in plans]
    llm = adapted.ours(kv_fill, max_num_batched_tokens=48)
    adapted.check(llm, random_prompts(93, len(plans)), plans, whose, kv_fill)


@pytest.mark.parametrize("name", ADAPTED.values())
def test_every_family(tmp_path: Path, engine: Callable[..., Any], name: str) -> None:
    model = Matrix(tmp_path, engine).checkpoint(name)
    adapted = Adapted(model, tmp_path, engine, **CASES[name].engine)
    rng = random.Random(100)
    plans = [random_plan(rng, LAYERS) for _ in range(8)]
    prompts, whose = random_prompts(100, len(plans)), WHOSE * 2
    adapted.check(adapted.ours("project"), prompts, plans, whose, "project")


def test_a_batch_without_adapters_and_one_with_a_single_one(adapted: Adapted) -> None:
    llm, prompts = adapted.ours("project"), random_prompts(94, len(PLANS))
    for one in (None, 1):
        adapted.check(llm, prompts, PLANS, [one] * len(PLANS), "project")


def test_more_adapters_than_places(adapted: Adapted) -> None:
    """Requests wait until an adapter has left its place, and then run with their own."""
    llm = adapted.ours("copy", max_loras=1)
    whose = [0, 1, 2, 0, 1, 2]
    plans = (PLANS * 2)[: len(whose)]
    adapted.check(llm, random_prompts(95, len(whose)), plans, whose, "copy")


def test_the_prefix_cache_keeps_adapters_apart(adapted: Adapted) -> None:
    llm = adapted.ours("project", enable_prefix_caching=True)
    (prompt,) = random_prompts(96, 1)
    prompt = (prompt * 100)[:80]
    for again in (False, True):
        for plan, one in product(PLANS, WHOSE):
            (output,) = adapted.check(llm, [prompt], [plan], [one], "project")
            first = plan == PLANS[0] and not again
            assert output.num_cached_tokens == (0 if first else 64)


def test_preempted_sequences_come_back_with_their_adapters(adapted: Adapted) -> None:
    llm = adapted.start(
        block_size=32,
        num_gpu_blocks_override=12,
        disable_log_stats=False,
        **engine_args(kv_fill="project"),
    )
    prompts = [(one * 100)[:60] for one in random_prompts(97, 8)]
    plans, whose = (PLANS * 2)[:8], (WHOSE[::-1] * 2)[:8]
    adapted.check(llm, prompts, plans, whose, "project")
    (preempted,) = [one for one in llm.get_metrics() if one.name == "vllm:num_preemptions"]
    assert preempted.value > 0


def test_a_method_that_reads_prompts_reads_them_with_their_adapters(adapted: Adapted) -> None:
    from vllm_adaskip.classifiers.adaskip.method import AdaSkip

    options = engine_args(method="adaskip", max_compute=0.7, kv_fill="copy")
    llm = adapted.start(enable_prefix_caching=False, **options)
    pairs = [(prompt, one) for prompt in random_prompts(98, 4, longest=6) for one in WHOSE]
    prompts, whose = zip(*pairs, strict=True)
    ran = adapted.run(llm, prompts, [None] * len(prompts), whose)
    method = llm.apply_model(lambda model: model.adaskip.state.planner.classifier)[0]
    assert isinstance(method, AdaSkip)
    met = set()
    for (prompt, one), output in zip(pairs, ran, strict=True):
        reference = adapted.reference(one)
        plan = method.decide(0.7, reference.observe(prompt, method))
        want, gap = reference.generate(prompt, plan.entries(), TOKENS, kv_fill="copy")
        assert list(output.outputs[0].token_ids) == want, f"{plan}, smallest gap {gap:.2g}"
        met.add((tuple(prompt), plan))
    assert len(met) > 4  # an adapter may change what its prompt decides
