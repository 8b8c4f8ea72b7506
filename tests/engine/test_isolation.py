# SPDX-License-Identifier: Apache-2.0
"""Off is free, isolation, not launched, no process-global state."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from conftest import TINY_LAYERS
from helpers.batches import Entries, greedy, logprobs_of, random_plan, random_prompts, sampling
from helpers.reference import Reference

from vllm_adaskip import engine_args


@pytest.fixture(scope="module")
def llm(engine: Callable[..., Any], tiny_llama: str) -> Any:
    return engine(tiny_llama, **engine_args())


def logprobs(llm: Any, prompts: list[list[int]], plan: Entries | None) -> list[Any]:
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        [sampling(plan, 16, logprobs=3) for _ in prompts],
        use_tqdm=False,
    )
    return logprobs_of(outputs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_with_nothing_skipped_logprobs_equal_stock_bit_for_bit(
    engine: Callable[..., Any], tiny_llama: str, dtype: str
) -> None:
    stock = engine(tiny_llama, dtype=dtype)
    ours = engine(tiny_llama, dtype=dtype, **engine_args())
    prompts = random_prompts(3, 12)
    want = logprobs(stock, prompts, None)
    assert logprobs(ours, prompts, None) == want
    assert logprobs(ours, prompts, []) == want


def test_a_sequence_does_not_notice_its_neighbours_plans(llm: Any) -> None:
    """Fails when rows are gathered or scattered to a wrong place."""
    prompts = random_prompts(4, 16)
    rng = random.Random(4)
    plans = [random_plan(rng, TINY_LAYERS) for _ in prompts]
    together = greedy(llm, prompts, plans)
    alone = [greedy(llm, [prompt], [plan])[0] for prompt, plan in zip(prompts, plans, strict=True)]
    assert together == alone
    assert len({tuple(tokens) for tokens in together}) == len(prompts)


def test_two_engines_in_one_process_never_see_each_others_plans(
    engine: Callable[..., Any], tiny_llama: str
) -> None:
    """Fails when the sequence table, or a feeder's planner, is shared by the process."""
    plans: list[Entries] = [[2, 3], ["attn:4", "mlp:5"]]
    pair = [engine(tiny_llama, **engine_args(method="static", skip=plan)) for plan in plans]
    reference = Reference(tiny_llama)
    prompts = random_prompts(5, 4)
    want = [[reference.generate(prompt, plan, 10)[0] for prompt in prompts] for plan in plans]
    for number, one in enumerate(pair):
        for index, prompt in enumerate(prompts):
            one.llm_engine.add_request(
                f"{number}-{index}", {"prompt_token_ids": prompt}, sampling(None, 10)
            )
    got: dict[str, list[int]] = {}
    while any(one.llm_engine.has_unfinished_requests() for one in pair):
        for one in pair:  # a step of each in turn
            for output in one.llm_engine.step():
                if output.finished:
                    got[output.request_id] = list(output.outputs[0].token_ids)
    assert [[got[f"{number}-{index}"] for index in range(4)] for number in range(2)] == want
    for one, plan in zip(pair, plans, strict=True):
        report = one.collective_rpc("adaskip_report")[0]
        assert report["method"] == "static" and report["requests"] == 4
        assert report["decode_tokens"] == 4 * 9
        skipped = {0} if plan == [2, 3] else set()
        assert set(report["attn_run"][2:4]) == (skipped or {36})


def launches(llm: Any, run: Callable[[], Any]) -> Counter[tuple[str, int, int]]:
    """Count ``(kind, layer, rows)`` of every sub-layer that is really called meanwhile."""
    seen: Counter[tuple[str, int, int]] = Counter()

    def watch(model: Any) -> list[Any]:
        def hook(kind: str, layer: int) -> Callable[..., None]:
            return lambda module, args, kwargs, out: seen.update([(kind, layer, len(out))])

        return [
            module.register_forward_hook(hook(kind, index), with_kwargs=True)
            for index, layer in enumerate(model.model.layers)
            for kind, module in (("attn", layer.self_attn), ("mlp", layer.mlp))
        ]

    handles = llm.apply_model(watch)[0]
    run()
    for handle in handles:
        handle.remove()
    return seen


def test_a_skipped_sub_layer_is_not_launched_and_some_rows_cost_those_rows(llm: Any) -> None:
    """Not launched, by what vLLM's own modules were called with."""
    prompts = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    plans: list[Entries] = [[2, "attn:4"], [2, "mlp:5"], [2, "attn:4"]]
    seen = launches(llm, lambda: greedy(llm, prompts, plans, max_tokens=6))
    steps = 5  # the first token comes from the prompt
    prefill = {9: 1}

    def rows(kind: str, layer: int) -> dict[int, int]:
        return {n: times for (k, at, n), times in seen.items() if (k, at) == (kind, layer)}

    assert rows("attn", 2) == prefill and rows("mlp", 2) == prefill
    assert rows("attn", 4) == {**prefill, 1: steps}
    assert rows("mlp", 5) == {**prefill, 2: steps}
    assert rows("attn", 0) == {**prefill, 3: steps}


def test_report_counts_what_ran(engine: Callable[..., Any], tiny_llama: str) -> None:
    llm = engine(tiny_llama, **engine_args())
    greedy(llm, [[1, 2, 3], [4, 5]], [[5, 6, "attn:7"], [6]], max_tokens=5)
    assert llm.collective_rpc("adaskip_report")[0]["live_rows"] == 2
    llm.llm_engine.step()  # vLLM tells the worker who has finished with its next step
    report = llm.collective_rpc("adaskip_report")[0]
    assert report == {
        "num_layers": 8,
        "prompt_tokens": 5,
        "shortened_tokens": 0,
        "decode_tokens": 8,
        "attn_run": [8, 8, 8, 8, 8, 4, 0, 4],
        "mlp_run": [8, 8, 8, 8, 8, 4, 0, 8],
        "requests": 2,
        "method": "none",
        "live_rows": 0,
        "plans": {"dense": 0, "skipping": 2, "gated": 0},
        "live_plans": 0,
        "coalesced": 0,
        "failures": 0,
    }


def test_a_refused_request_leaves_the_others_alone(llm: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    prompts = random_prompts(7, 3)
    plans: list[Entries] = [[1], [], ["mlp:3"]]
    want = greedy(llm, prompts, plans, max_tokens=8)
    core = llm.llm_engine
    for index in range(3):
        core.add_request(
            str(index), {"prompt_token_ids": prompts[index]}, sampling(plans[index], 8)
        )
    got = {}
    while core.has_unfinished_requests():
        bad: Any = [99]
        with pytest.raises(VLLMValidationError, match=r"adaskip_skip: 99 .* layers 0 to 7"):
            core.add_request("bad", {"prompt_token_ids": [1]}, sampling(bad, 8))
        for output in core.step():
            if output.finished:
                got[int(output.request_id)] = list(output.outputs[0].token_ids)
    assert [got[index] for index in range(3)] == want
