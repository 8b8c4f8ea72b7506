# SPDX-License-Identifier: Apache-2.0
"""What `kv_fill` writes is what a sequence finds when it runs again what it left out.

Sequences change their plan while they decode, so that attention reads K/V of tokens that
had passed it by; tokens must equal those of the float32 loop that fills in the same way.
Fails when nothing is written, when K/V of another layer or token are, when they go to
another slot, or when a passed layer sees another layer's hidden state.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import TINY_LAYERS
from helpers.batches import Entries, greedy, random_plan, random_prompts, run_with_changes
from helpers.reference import Reference

from vllm_adaskip import engine_args

TOKENS = 24


@pytest.mark.parametrize("kv_fill", ["copy", "project"])
def test_a_sequence_that_runs_more_finds_what_was_filled(
    engine: Callable[..., Any], tiny_llama: str, kv_fill: str
) -> None:
    llm = engine(tiny_llama, max_num_batched_tokens=48, **engine_args(kv_fill=kv_fill))
    reference = Reference(tiny_llama)
    rng = random.Random(11)
    # Distinct lengths, by which rows are told apart.
    prompts = [[rng.randrange(512) for _ in range(3 + 5 * index)] for index in range(14)]
    plans: list[Entries] = [random_plan(rng, TINY_LAYERS) for _ in prompts]
    plans[:4] = [[0, 1], [3, 4, 5], [*range(1, 8)], [*range(7)]]
    changes: list[tuple[int, Entries]] = [(rng.randint(2, 12), []) for _ in prompts]
    changes[5:9] = [(4, random_plan(rng, TINY_LAYERS)) for _ in range(4)]
    outputs = run_with_changes(llm, prompts, plans, changes, TOKENS)
    got = [list(output.token_ids) for output in outputs]
    others = 0
    for prompt, plan, then, tokens in zip(prompts, plans, changes, got, strict=True):
        want, gap = reference.generate(prompt, plan, TOKENS, kv_fill=kv_fill, then=then)
        assert tokens == want, f"{plan} then {then}, smallest gap {gap:.2g}"
        other = {"copy": "project", "project": "copy"}[kv_fill]
        others += want != reference.generate(prompt, plan, TOKENS, kv_fill=other, then=then)[0]
    assert others > 5  # what is written does decide the tokens


@pytest.mark.parametrize("kv_fill", ["copy", "project"])
def test_filling_changes_nothing_for_who_keeps_its_plan(
    engine: Callable[..., Any], tiny_llama: str, kv_fill: str
) -> None:
    """Nor for its neighbours: a write to a wrong slot would."""
    llm = engine(tiny_llama, **engine_args(kv_fill=kv_fill))
    reference = Reference(tiny_llama)
    rng = random.Random(12)
    prompts = random_prompts(12, 12)
    plans: list[Entries] = [random_plan(rng, TINY_LAYERS) for _ in prompts]
    plans[:2] = [[f"attn:{layer}" for layer in range(TINY_LAYERS)], []]
    for prompt, plan, tokens in zip(prompts, plans, greedy(llm, prompts, plans), strict=True):
        assert tokens == reference.generate(prompt, plan, len(tokens))[0]


@pytest.mark.parametrize(
    ("dtype", "block_size", "cache_dtype"),
    [("float32", 32, "auto"), ("bfloat16", 128, "auto"), ("bfloat16", 64, "fp8")],
)
def test_one_write_to_many_layers_is_many_writes_to_one(
    engine: Callable[..., Any], tiny_llama: str, dtype: str, block_size: int, cache_dtype: str
) -> None:
    """In every cache dtype and block size, through the backend's own op."""
    options = {"dtype": dtype, "block_size": block_size, "kv_cache_dtype": cache_dtype}
    plugin = engine_args(kv_fill="copy")
    try:
        llm = engine(tiny_llama, **options, num_gpu_blocks_override=10, **plugin)
    except NotImplementedError as refusal:  # a processor without AVX-512
        assert cache_dtype == "fp8"
        pytest.skip(str(refusal))
    greedy(llm, [[1, 2, 3]], [[2]], max_tokens=3)

    def compare(model: Any) -> tuple[bool, bool, bool]:
        cache = model.adaskip.cache
        caches = [layer.kv_cache for layer in cache._layers]
        blocks, slots = cache.geometry
        layers = torch.arange(40) % TINY_LAYERS
        to = torch.randperm(blocks * slots)[:40]
        rows = [torch.randn(40, 2, 32, dtype=model.lm_head.weight.dtype) for _ in range(2)]
        results = []
        for joint in (True, False):
            for one in caches:
                one.zero_()
            if not joint:
                assert cache._joint is not None
                cache._joint = None
            cache.write_many(layers, *rows, to)
            results.append([one.clone() for one in caches])
        same = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        return same, all(one.any() for one in results[0]), (blocks, slots) == (10, block_size)

    assert llm.apply_model(compare)[0] == (True, True, True)
