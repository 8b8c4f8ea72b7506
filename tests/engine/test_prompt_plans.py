# SPDX-License-Identifier: Apache-2.0
"""Shortened prompts beside whole ones mean what a plain float32 loop means by them.

Fails when a prompt's last tokens leave something out, when a layer that was left out lacks K/V of
the others, or has them too late, when a chunk that cuts the tail forgets where it begins, and when
a block is found by a prompt that reads it under another prompt plan, or none.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from conftest import TINY_LAYERS
from helpers.batches import Entries, random_plan, random_prompts, sampling, small_blocks
from helpers.reference import Reference
from vllm.exceptions import VLLMValidationError

from vllm_adaskip import request
from vllm_adaskip.engine.prompt_plan import TAIL

BLOCK, TOKENS = 32, 12
SHORT = 4  # an exit


@dataclass(frozen=True)
class Asked:
    """A request: what its prompt's tokens leave out, how many do not, and what its answer does."""

    prompt: list[int]
    left_out: Entries
    tail: int
    plan: Entries

    @property
    def extra_args(self) -> dict[str, Any]:
        above = list(range(SHORT, TINY_LAYERS))
        named = {"prompt_exit": SHORT} if self.left_out == above else {"prompt_skip": self.left_out}
        return request(skip=self.plan, prompt_tail=self.tail, **named)


@pytest.fixture(scope="module")
def make(engine: Callable[..., Any], tiny_llama: str) -> Callable[..., Any]:
    return small_blocks(engine, tiny_llama, BLOCK)


def run(llm: Any, asked: Sequence[Asked], **more: Any) -> list[Any]:
    outputs: list[Any] = llm.generate(
        [{"prompt_token_ids": one.prompt} for one in asked],
        [
            sampling(None, **{"max_tokens": TOKENS, "extra_args": one.extra_args, **more})
            for one in asked
        ],
        use_tqdm=False,
    )
    return outputs


def check(
    reference: Reference, asked: Sequence[Asked], outputs: Sequence[Any], tokens: int = TOKENS
) -> None:
    whole = 0
    for one, output in zip(asked, outputs, strict=True):
        short = one.left_out, one.tail
        want, gap = reference.generate(one.prompt, one.plan, tokens, prompt_plan=short)
        for answer in output.outputs:
            assert list(answer.token_ids) == want, f"{one}, smallest gap {gap:.2g}"
        whole += want == reference.generate(one.prompt, one.plan, tokens)[0]
    assert len(asked) == 1 or whole < len(asked)  # it does matter what prompts leave out


def mixture(seed: int, count: int, longest: int = 90) -> list[Asked]:
    """Whole prompts and shortened ones, by exits and by sub-layers, with tails of any length."""
    rng = random.Random(seed)
    prompts = random_prompts(seed, count - 2, longest)
    plans = [random_plan(rng, TINY_LAYERS) for _ in range(count)]
    ways: list[Entries] = [list(range(SHORT, TINY_LAYERS)), [], *plans]
    return [
        Asked(prompt, rng.choice(ways), rng.choice([1, 5, TAIL, 40]), rng.choice([[], *plans]))
        for prompt in [*prompts, [7], prompts[0]]
    ]


@pytest.mark.parametrize("kv_fill", ["none", "copy", "project"])
@pytest.mark.parametrize("chunk", [24, 256])
def test_whole_and_shortened_prompts_in_one_batch(
    make: Callable[..., Any], reference: Reference, kv_fill: str, chunk: int
) -> None:
    llm = make(kv_fill, max_num_batched_tokens=chunk, max_num_seqs=12)
    asked = mixture(31 + chunk, 24)
    for _ in range(2):  # then from the prefix cache
        check(reference, asked, run(llm, asked))


def test_prompts_in_pieces_and_preempted_sequences(
    make: Callable[..., Any], reference: Reference
) -> None:
    llm = make("project", num_gpu_blocks_override=10, max_num_batched_tokens=48, max_num_seqs=6)
    asked = mixture(57, 12, longest=120)
    outputs = run(llm, asked, max_tokens=60)
    check(reference, asked, outputs, 60)
    counted = {one.name: getattr(one, "value", 0) for one in llm.get_metrics()}
    assert counted["vllm:num_preemptions"] > 0


def test_several_answers_to_one_shortened_prompt(
    make: Callable[..., Any], reference: Reference
) -> None:
    (prompt,) = random_prompts(5, 1, 90)
    asked = [Asked(prompt * 3, list(range(SHORT, TINY_LAYERS)), 5, [2])]
    (output,) = outputs = run(make(), asked, n=3, temperature=1e-6)
    assert len(output.outputs) == 3
    check(reference, asked, outputs)


def test_blocks_are_found_under_equal_prompt_plans_alone(
    make: Callable[..., Any], reference: Reference
) -> None:
    """A long text with other questions behind it, read under one prompt plan after another."""
    llm, rng = make(), random.Random(3)
    text = [rng.randrange(512) for _ in range(5 * BLOCK)]
    exits, others = list(range(SHORT, TINY_LAYERS)), [6, "attn:3"]
    before: list[tuple[Entries, int, int]] = []
    for left_out, tail, length in [
        (exits, 8, 20),
        (exits, 8, 30),
        (others, 8, 20),
        ([], 8, 20),
        ([], 8, 30),
        (exits, 5, 20),
        (exits, 70, 20),
        (exits, 70, 20),
        (others, 8, 60),
    ]:
        one = Asked([*text, *(rng.randrange(512) for _ in range(length))], left_out, tail, [])
        (output,) = outputs = run(llm, [one])
        check(reference, [one], outputs)
        # What comes before the tail is equal for all with this prompt plan.
        same = [
            min(len(text) + length - tail, len(text) + other - theirs) if left_out else len(text)
            for plan, theirs, other in before
            if plan == left_out
        ]
        found = max((min(shared, len(text)) // BLOCK * BLOCK for shared in same), default=0)
        if (left_out, tail) == (exits, 70) and (exits, 70, length) in before:
            found = len(text)  # the same tail begins at the same place
        assert output.num_cached_tokens == found, (left_out, tail, length)
        before.append((left_out, tail, length))


def test_left_out_means_not_launched(make: Callable[..., Any]) -> None:
    """Layers above an exit see the tail alone, watched at vLLM's own modules."""
    llm = make("project", enable_prefix_caching=False)
    seen: list[tuple[int, int]] = []

    def watch(model: Any) -> None:
        for index, layer in enumerate(model.stack.layers):
            layer.mlp.register_forward_hook(
                lambda module, args, output, index=index: seen.append((index, len(args[0])))
            )

    llm.apply_model(watch)
    (prompt,) = random_prompts(8, 1, 1)
    asked = Asked(prompt * 200, list(range(SHORT, TINY_LAYERS)), 10, [])
    run(llm, [asked], max_tokens=1)
    assert seen == [(layer, 200 if layer < SHORT else 10) for layer in range(TINY_LAYERS)]


def test_a_server_s_prompt_plan_is_for_prompts_that_are_long_enough(
    make: Callable[..., Any], reference: Reference
) -> None:
    llm = make("none", {"prompt": {"exit": SHORT, "tail": 5, "from": 40}})
    prompts = [random_prompts(9, 1, 1)[0] * length for length in (39, 40)]
    exits = list(range(SHORT, TINY_LAYERS))
    for extra_args, plans in [
        (None, [([], 5), (exits, 5)]),
        ({"adaskip_skip": [2]}, [([], 5), (exits, 5)]),
        (request(off=True), [([], 5), ([], 5)]),
        (request(prompt_exit=TINY_LAYERS), [([], 5), ([], 5)]),
        (request(prompt_skip=[3]), [([3], 5), ([3], 5)]),
        (request(prompt_tail=9), [([], 9), (exits, 9)]),
    ]:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            sampling(None, TOKENS, extra_args=extra_args),
            use_tqdm=False,
        )
        skip = (extra_args or {}).get("adaskip_skip", [])
        for prompt, short, output in zip(prompts, plans, outputs, strict=True):
            want, _ = reference.generate(prompt, skip, TOKENS, prompt_plan=short)
            assert list(output.outputs[0].token_ids) == want, extra_args


def test_prompts_are_shortened_while_many_wait(
    make: Callable[..., Any], reference: Reference
) -> None:
    prompt = {"exit": SHORT, "tail": 5, "busy": {"enter": 4, "leave": 1}}
    llm = make(options={"prompt": prompt}, enable_prefix_caching=False)
    prompts = random_prompts(17, 8, longest=90)
    exits = list(range(SHORT, TINY_LAYERS))

    def answers(count: int, extra_args: dict[str, Any] | None = None) -> list[list[int]]:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts[:count]],
            sampling(None, TOKENS, extra_args=extra_args),
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    def wanted(count: int, whole: int) -> list[list[int]]:
        return [
            reference.generate(
                prompt, [], TOKENS, prompt_plan=None if place < whole else (exits, 5)
            )[0]
            for place, prompt in enumerate(prompts[:count])
        ]

    # All come before the first step, so as many wait as came before.
    assert answers(4) == wanted(4, 4)
    assert answers(8) == wanted(8, 4)
    assert answers(1) == wanted(1, 1)
    assert answers(8, request(prompt_exit=SHORT)) == wanted(8, 0)
    assert answers(8, request(off=True)) == wanted(8, 8)


def test_log_probabilities_of_a_shortened_prompt_are_refused(make: Callable[..., Any]) -> None:
    llm, asked = make(), Asked([1] * 50, [3], 5, [])
    with pytest.raises(VLLMValidationError, match=r"no log-probabilities.*adaskip_prompt_exit 8"):
        run(llm, [asked], prompt_logprobs=1)
    run(llm, [Asked([1] * 50, [], 5, [])], prompt_logprobs=1)
