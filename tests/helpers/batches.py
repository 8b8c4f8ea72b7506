# SPDX-License-Identifier: Apache-2.0
"""Random prompts and plans for engine tests, a greedy run of them, what a model decided."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from vllm_adaskip import SkipPlan

Entries = list[int | str]
#: What the tokens of a prompt leave out, but for its last ones, and how many those are.
PromptPlan = tuple[Entries, int]


def random_prompts(
    seed: int, count: int, longest: int = 90, vocabulary: int = 512
) -> list[list[int]]:
    """Prompts of 1 to ``longest`` random tokens."""
    rng = random.Random(seed)
    return [
        [rng.randrange(vocabulary) for _ in range(rng.randint(1, longest))] for _ in range(count)
    ]


def random_plan(rng: random.Random, num_layers: int) -> Entries:
    """Any plan that can run: each sub-layer left out with a chance drawn per plan."""
    while True:
        chance = rng.choice([0.1, 0.3, 0.6])
        attention, mlp = (
            sum((rng.random() < chance) << layer for layer in range(num_layers)) for _ in range(2)
        )
        plan = SkipPlan(num_layers, attention, mlp)
        if not plan.skips_everything:
            return plan.entries()


def sampling(plan: Entries | None, max_tokens: int, **more: Any) -> Any:
    """Greedy sampling parameters with a plan; None leaves our arguments out."""
    from vllm import SamplingParams

    args = None if plan is None else {"adaskip_skip": plan}
    return SamplingParams(
        **{
            "temperature": 0,
            "max_tokens": max_tokens,
            "detokenize": False,
            "ignore_eos": True,
            "extra_args": args,
            **more,
        }
    )


def greedy(
    llm: Any,
    prompts: Sequence[Sequence[int]],
    plans: Sequence[Entries | None],
    max_tokens: int = 24,
) -> list[list[int]]:
    """Return the tokens of one batch."""
    outputs = llm.generate(
        [{"prompt_token_ids": list(prompt)} for prompt in prompts],
        [sampling(plan, max_tokens) for plan in plans],
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def logprobs_of(outputs: Sequence[Any]) -> list[Any]:
    """Return, of each request, the log-probabilities of each token's candidates."""
    return [
        [{token: one.logprob for token, one in step.items()} for step in output.outputs[0].logprobs]
        for output in outputs
    ]


def run_with_changes(
    llm: Any,
    prompts: Sequence[Sequence[int]],
    plans: Sequence[Entries],
    changes: Sequence[tuple[int, Entries]],
    max_tokens: int,
    **more: Any,
) -> list[Any]:
    """Run one batch; row ``i`` follows ``changes[i]`` once it has that many tokens.

    Prompts must differ in length, by which rows are told apart. ``more`` is of sampling.
    """
    state = llm.apply_model(lambda model: model.adaskip.state)[0]
    core = llm.llm_engine
    for index, (prompt, plan) in enumerate(zip(prompts, plans, strict=True)):
        params = sampling(plan, max_tokens, **more)
        core.add_request(str(index), {"prompt_token_ids": prompt}, params)
    got: dict[int, Any] = {}
    while core.has_unfinished_requests():
        for output in core.step():
            index, (answer,) = int(output.request_id), output.outputs
            after, plan = changes[index]
            if len(answer.token_ids) == after:
                (row,) = [
                    row
                    for row, length in enumerate(state.table.prompt_lens)
                    if length == len(prompts[index])
                ]
                state.table.follow(row, SkipPlan.parse(plan, state.table.num_layers))
            if output.finished:
                got[index] = answer
    return [got[index] for index in range(len(prompts))]


def decisions(model: Any) -> list[str]:
    """Return every decided plan; for `LLM.apply_model`."""
    return [str(plan) for plan in model.adaskip.state.memo.values()]


def small_blocks(engine: Callable[..., Any], model: str, size: int) -> Callable[..., Any]:
    """Return what makes engines with prefix caching, as many as asked for, each once.

    It takes the fill, our options beside it, and vLLM's, and empties the prefix cache.
    """
    from vllm_adaskip import engine_args

    made: dict[str, Any] = {}

    def make(kv_fill: str = "none", options: dict[str, Any] | None = None, **more: Any) -> Any:
        key = f"{kv_fill} {options} {more}"
        if key not in made:
            more = {"disable_log_stats": False, "block_size": size, **more}
            made[key] = engine(model, **more, **engine_args(kv_fill=kv_fill, **(options or {})))
        made[key].reset_prefix_cache()
        return made[key]

    return make
