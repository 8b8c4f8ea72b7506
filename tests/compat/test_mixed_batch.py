# SPDX-License-Identifier: Apache-2.0
"""One batch of mixed plans on the bundled model, whatever vLLM release is installed.

Small, so that ``make test-0.29`` can run it in an environment with little else in it. Fails
when a name in `engine.compat` is another release's.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

import pytest
import vllm
from helpers.batches import Entries, greedy, sampling
from helpers.reference import Reference

import vllm_adaskip
from vllm_adaskip import engine_args

PLANS: list[Entries] = [[], [3, 4], ["attn:5"], ["mlp:6", "mlp:7"], [0, 11], [*range(2, 10)]]
LENGTHS = [1, 40, 7, 25, 12, 33]
TOKENS = 16


@pytest.fixture(scope="module")
def model() -> str:
    return vllm_adaskip.bundled_model()


@pytest.fixture(scope="module")
def prompts(model: str) -> list[list[int]]:
    """Random words of its vocabulary; of what is trained only the weights matter here."""
    rng = random.Random(90)
    vocabulary = Reference(model).model.config.vocab_size
    return [[rng.randrange(vocabulary) for _ in range(length)] for length in LENGTHS]


def test_the_release_is_one_we_support() -> None:
    major, minor = map(int, vllm.__version__.split(".")[:2])
    assert (0, 26) <= (major, minor) < (0, 34)
    (entry,) = entry_points(group="vllm.general_plugins", name="adaskip")
    entry.load()()


@pytest.fixture(scope="module")
def make(engine: Callable[..., Any], model: str) -> Callable[[str], Any]:
    """Engines by `kv_fill`."""
    return functools.cache(
        lambda kv_fill: engine(model, max_num_batched_tokens=48, **engine_args(kv_fill=kv_fill))
    )


@pytest.mark.parametrize("kv_fill", ["none", "copy", "project"])
def test_a_mixed_batch_gives_the_tokens_of_the_reference(
    make: Callable[[str], Any], model: str, prompts: list[list[int]], kv_fill: str
) -> None:
    """Prompts come in chunks of what is left of 48 tokens a step."""
    reference = Reference(model)
    got = greedy(make(kv_fill), prompts, PLANS, TOKENS)
    for prompt, plan, tokens in zip(prompts, PLANS, got, strict=True):
        want, gap = reference.generate(prompt, plan, TOKENS, kv_fill=kv_fill)
        assert tokens == want, f"plan {plan}, smallest gap {gap:.2g}"


def test_a_bad_request_is_refused(make: Callable[[str], Any], prompts: list[list[int]]) -> None:
    from vllm.exceptions import VLLMValidationError

    llm = make("none")
    with pytest.raises(VLLMValidationError, match=r"adaskip_skip: 12 .* layers 0 to 11"):
        llm.generate({"prompt_token_ids": prompts[0]}, sampling([12], 4), use_tqdm=False)
