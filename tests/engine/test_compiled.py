# SPDX-License-Identifier: Apache-2.0
"""Invariant 12: under vLLM's default compilation plans mean the same.

Guards against a step's plan that is looked at inside what `torch.compile` traces: the
first plan seen would then hold for ever.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from batches import greedy, random_plan, random_prompts
from conftest import TINY_LAYERS
from reference import Reference

from vllm_adaskip import engine_args


def test_compiled_gives_the_tokens_of_the_reference(
    engine: Callable[..., Any], tiny_llama: str
) -> None:
    llm = engine(tiny_llama, enforce_eager=False, **engine_args())
    reference = Reference(tiny_llama)
    rng = random.Random(11)
    for seed in range(2):  # dense, then two rounds of plans, then dense again
        prompts = random_prompts(seed, 8)
        for plans in ([[]] * 8, [random_plan(rng, TINY_LAYERS) for _ in prompts], [[]] * 8):
            got = greedy(llm, prompts, plans, max_tokens=12)
            want = [
                reference.generate(prompt, plan, 12)[0]
                for prompt, plan in zip(prompts, plans, strict=True)
            ]
            assert got == want
