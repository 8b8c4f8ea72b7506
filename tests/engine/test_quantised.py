# SPDX-License-Identifier: Apache-2.0
"""Quantised checkpoints, made of the bundled model, so that answers mean something.

With nothing skipped all is stock vLLM's, bit for bit. Under plans tokens are those of the float32
loop with the dequantised weights, or where they part the loop's two best logits are nearly equal:
kernels compute in bfloat16, and W8A8 rounds activations as well.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from helpers import adapters, quantised
from helpers.batches import Entries, greedy, logprobs_of, sampling
from helpers.reference import Reference, distance
from transformers import AutoTokenizer

from vllm_adaskip import bundled_model, engine_args
from vllm_adaskip.lab.testbed.tasks import TASKS, samples

TOKENS = 12
PLANS: list[Entries] = [[5], [5, 6], ["attn:3", "attn:8"], ["mlp:4", "mlp:7"], [], [3, "mlp:9"]]


class Quantised:
    """Engines of one kind, each made once, and the reference."""

    def __init__(self, kind: str, folder: Path, engine: Callable[..., Any]) -> None:
        self.kind = kind
        self.path, self.reference_path = quantised.write(bundled_model(), folder, kind)
        self.reference = Reference(self.reference_path)
        self._engine = engine
        self.ours = cache(self._ours)

    def start(self, **options: Any) -> Any:
        return self._engine(self.path, dtype="bfloat16", block_size=32, **options)

    def _ours(self, kv_fill: str) -> Any:
        return self.start(**engine_args(kv_fill=kv_fill))

    def check(self, llm: Any, plans: list[Entries], kv_fill: str, max_tokens: int = TOKENS) -> int:
        """Run a batch, and return how many sequences equal the reference's to their end."""
        got = greedy(llm, PROMPTS, plans, max_tokens)
        return quantised.equal(self.kind, self.reference, PROMPTS, plans, got, kv_fill)


TOKENIZER = AutoTokenizer.from_pretrained(bundled_model())
PROMPTS: list[list[int]] = [
    TOKENIZER(samples(task, "test", 1, 1)[0].prompt, add_special_tokens=False).input_ids
    for task in TASKS
][: len(PLANS)]


@pytest.fixture(scope="module")
def make(
    tmp_path_factory: pytest.TempPathFactory, engine: Callable[..., Any]
) -> Callable[[str], Quantised]:
    return cache(lambda kind: Quantised(kind, tmp_path_factory.mktemp("quantised"), engine))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(kind, marks=() if kind == "W8A8 int8" else quantised.needs_avx512)
        for kind in quantised.KINDS
    ],
)
def model(request: Any, make: Callable[[str], Quantised]) -> Quantised:
    return make(request.param)


@pytest.fixture(scope="module")
def int8(make: Callable[[str], Quantised]) -> Quantised:
    """Return what stands for all kinds where the engine around the weights is tried."""
    return make("W8A8 int8")


def test_nothing_skipped_is_stock_bit_for_bit(model: Quantised) -> None:
    params = sampling(None, TOKENS, logprobs=3)
    prompts = [{"prompt_token_ids": one} for one in PROMPTS]
    stock, ours = (
        logprobs_of(llm.generate(prompts, params, use_tqdm=False))
        for llm in (model.start(), model.ours("project"))
    )
    assert stock == ours


@pytest.mark.parametrize("kv_fill", ["project", "copy"])
def test_plans_mean_what_they_mean_with_the_dequantised_weights(
    model: Quantised, kv_fill: str
) -> None:
    llm = model.ours(kv_fill)
    assert model.check(llm, PLANS, kv_fill) >= len(PLANS) - 2
    assert model.check(llm, PLANS[::-1], kv_fill) >= len(PLANS) - 2


def test_prompts_in_pieces_and_preempted_sequences(int8: Quantised) -> None:
    llm = int8.start(
        max_model_len=128,
        max_num_batched_tokens=32,
        num_gpu_blocks_override=7,
        disable_log_stats=False,
        **engine_args(kv_fill="project"),
    )
    assert int8.check(llm, PLANS, "project", max_tokens=40) >= len(PLANS) - 2
    (preempted,) = [one for one in llm.get_metrics() if one.name == "vllm:num_preemptions"]
    assert preempted.value > 0


def test_the_prefix_cache(int8: Quantised) -> None:
    """Prompts are found again whatever the plan, and mean the same."""
    llm = int8.start(enable_prefix_caching=True, **engine_args(kv_fill="copy"))
    (prompt,) = [max(PROMPTS, key=len)]
    prompt = (prompt * 4)[:70]
    for number, plan in enumerate(PLANS):
        (output,) = llm.generate(
            {"prompt_token_ids": prompt}, sampling(plan, TOKENS), use_tqdm=False
        )
        assert output.num_cached_tokens == (64 if number else 0)
        want, gap = int8.reference.generate(prompt, plan, TOKENS, kv_fill="copy")
        same = list(output.outputs[0].token_ids) == want
        assert same or gap < quantised.NEAR[int8.kind], f"{plan}, smallest gap {gap:.2f}"


@quantised.needs_avx512
def test_adapters_of_requests(int8: Quantised, tmp_path: Path) -> None:
    """Mixed adapters under mixed plans, beside the dequantised weights with each merged in."""
    from vllm.lora.request import LoRARequest

    paths = adapters.write(int8.reference_path, tmp_path, 2, strength=0.2)
    references = [int8.reference, *(Reference(merged) for _, merged in paths)]
    requests = [None, *(LoRARequest(one, at, one) for at, (one, _) in enumerate(paths, start=1))]
    llm = int8.start(
        enable_lora=True, max_loras=3, max_lora_rank=8, **engine_args(kv_fill="project")
    )
    cases = [*product(PROMPTS[:4], PLANS[:4], range(3))]
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt, _, _ in cases],
        [sampling(plan, TOKENS, logprobs=5) for _, plan, _ in cases],
        lora_request=[requests[whose] for _, _, whose in cases],
        use_tqdm=False,
    )
    right = other_adapter = dense = 0.0
    for (prompt, plan, whose), output in zip(cases, outputs, strict=True):
        one = prompt, output.outputs[0]
        right += distance(*one, references[whose], plan)
        other_adapter += distance(*one, references[(whose + 1) % 3], plan)
        dense += distance(*one, references[whose], [])
    assert right < 0.25 * min(other_adapter, dense), (right, other_adapter, dense)
