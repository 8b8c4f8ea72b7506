# SPDX-License-Identifier: Apache-2.0
"""What `adaskip_ran` says of each gated request is what the reference did, token by token.

Fails when rows are mixed up, when replayed tokens count twice, when what has just finished is
not there yet, and when a plan that meets a budget is not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from helpers.batches import random_prompts, sampling
from helpers.gated import NEVER, Arguments, Gated, maker


@pytest.fixture(scope="module")
def make(engine: Callable[..., Any], tiny_llama: str) -> Callable[..., Gated]:
    return maker(engine, tiny_llama)


def test_of_each_request_right_after_it_and_later(make: Callable[..., Gated]) -> None:
    """Answers of different lengths, more than there are rows: they enter, move and leave."""
    gated = make()
    prompts = random_prompts(80, 30)
    kinds = None, {"adaskip_max_compute": 0.8}, {"adaskip": "off"}, None, {"adaskip_skip": [2]}
    arguments: list[Arguments] = [kinds[one % 5] for one in range(30)]
    lengths = [1 + (7 * one) % 30 for one in range(30)]
    gated.llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        [
            sampling(None, length, extra_args=one)
            for length, one in zip(lengths, arguments, strict=True)
        ],
        use_tqdm=False,
    )
    found = gated.ran(prompts, arguments)
    left_out = set()
    for prompt, one, length, ran in zip(prompts, arguments, lengths, found, strict=True):
        if one and "adaskip_max_compute" not in one:
            assert ran is None
        else:
            assert ran == gated.must_have_run(prompt, one, length)
            left_out.add(str(ran["left_out"]))
    assert len(left_out) > 8
    gated.run(random_prompts(81, 20), [None] * 20, 4)
    assert gated.ran(prompts, arguments) == found


def test_none_of_requests_that_nobody_made(make: Callable[..., Gated]) -> None:
    assert make().ran([[1, 2, 3, 4, 5]], [None]) == [None]


def test_nothing_is_left_out_where_nothing_saturates(make: Callable[..., Gated]) -> None:
    gated = make(NEVER, warm_up=0)
    gated.run([[1, 2]], [None], 5)
    assert gated.ran([[1, 2]], [None]) == [{"tokens": 4, "left_out": [0] * 16}]


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("chunk", [256, 24])
def test_replayed_tokens_count_once(
    make: Callable[..., Gated], prefix_caching: bool, chunk: int
) -> None:
    gated = make(
        engine_options={
            "num_gpu_blocks_override": 12,
            "max_num_batched_tokens": chunk,
            "enable_prefix_caching": prefix_caching,
        },
    )
    prompts = random_prompts(82, 8, longest=40)
    arguments: list[Arguments] = [None] * 6 + [{"adaskip_max_compute": 0.85}] * 2
    gated.run(prompts, arguments, 80)
    counters = {metric.name: getattr(metric, "value", 0) for metric in gated.llm.get_metrics()}
    assert counters["vllm:num_preemptions"] > 0
    wanted = zip(prompts, arguments, strict=True)
    want = [gated.must_have_run(prompt, one, 80) for prompt, one in wanted]
    assert gated.ran(prompts, arguments) == want


def test_samples_and_repetitions_are_counted_together_unless_told_apart(
    make: Callable[..., Gated],
) -> None:
    gated = make()
    (prompt,) = random_prompts(83, 1)
    gated.llm.generate(
        {"prompt_token_ids": prompt},
        sampling(None, 16, n=3, temperature=1.0, top_k=1),
        use_tqdm=False,
    )
    gated.run([prompt], [None], 16)
    want = gated.must_have_run(prompt, None, 16)
    assert sum(want["left_out"])
    four = {"tokens": 4 * 15, "left_out": [4 * one for one in want["left_out"]]}
    assert gated.ran([prompt], [None]) == [four]
    gated.run([prompt], [{"mine": 7}], 16)
    assert gated.ran([prompt] * 2, [{"mine": 7}, None]) == [want, four]
