# SPDX-License-Identifier: Apache-2.0
"""The option `guard` in an engine: who is admitted dense, and that all tokens stay right.

What steps take is made up where a verdict is wanted; that it is measured at start-up, on
the compiled engine, is a test of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import TINY_LAYERS, TINY_SHAPE
from helpers.batches import Entries, greedy, random_prompts, sampling
from helpers.reference import Reference

from vllm_adaskip import DecoderShape, engine_args
from vllm_adaskip.classifiers.adaskip.method import AdaSkip
from vllm_adaskip.classifiers.ends import EndsOptions
from vllm_adaskip.engine.guard import PARTS, Costs

SKIP: Entries = [2, 3, "attn:5"]
STATIC = {"method": "static", "skip": SKIP, "kv_fill": "copy", "guard": True}
TOKENS = 12
METHOD = AdaSkip(DecoderShape(*TINY_SHAPE), EndsOptions())


class Guarded:
    """An engine whose costs say what a test wants."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self._state = llm.apply_model(lambda model: model.adaskip.state)[0]

    def pays(self, loop: float) -> None:
        """Have a layer in the loop cost so much of a dense step's."""
        table = np.full((len(PARTS), 2), 1e-9)
        table[PARTS.index("dense")] = 2 * TINY_LAYERS, 16 * 2 * TINY_LAYERS
        table[PARTS.index("attention")] = table[PARTS.index("mlp")] = loop, 16 * loop
        self._state.guard.costs = Costs([1, 16], table, [])
        self._state.guard.saw = lambda *_: None  # or real steps would correct it

    def report(self) -> dict[str, Any]:
        return self.llm.collective_rpc("adaskip_report")[0]["guard"]

    def counted(self) -> dict[str, int]:
        return {key: self.report()[key] for key in ("followed", "slower", "margin")}


@pytest.fixture(scope="module")
def static(engine: Callable[..., Any], tiny_llama: str) -> Guarded:
    return Guarded(engine(tiny_llama, block_size=32, **engine_args(**STATIC)))


def test_plans_are_followed_or_not_as_they_pay_and_named_ones_always(
    static: Guarded, reference: Reference
) -> None:
    prompts = random_prompts(31, 8)
    nobody: list[Entries | None] = [None] * 8
    beside_dense: list[Entries | None] = [[], *nobody[1:]]
    named: list[Entries | None] = [None, [1], None, [], None, None, ["mlp:4"], None]
    for loop, plans, decided in (
        (0.5, named, SKIP),
        (2.0, beside_dense, []),
        (2.0, [[1], SKIP, ["mlp:4"], [0], [], [1], SKIP, SKIP], []),
        (0.5, beside_dense, SKIP),
    ):
        static.pays(loop)
        before = static.counted()
        want = [
            reference.generate(prompt, decided if plan is None else plan, TOKENS, kv_fill="copy")[0]
            for prompt, plan in zip(prompts, plans, strict=True)
        ]
        assert greedy(static.llm, prompts, plans, TOKENS) == want
        after = static.counted()
        grown = {key: after[key] - before[key] for key in after if after[key] > before[key]}
        asked = plans.count(None)
        assert grown == ({"followed" if decided else "slower": asked} if asked else {})
        if asked:
            last = static.llm.collective_rpc("adaskip_plans", args=([(None, prompts[-1])],))
            assert last == [[SKIP if decided else []]]


def test_a_sequence_that_comes_back_keeps_what_it_was_given(
    engine: Callable[..., Any], tiny_llama: str, reference: Reference
) -> None:
    """Under a cache too small for all, while the verdict changes between steps."""
    one = Guarded(
        engine(
            tiny_llama,
            block_size=32,
            kv_cache_memory_bytes=12 * (128 << 10),
            disable_log_stats=False,
            **engine_args(**STATIC),
        )
    )
    prompts = random_prompts(32, 10, longest=40)
    core, waiting = one.llm.llm_engine, [*enumerate(prompts)]
    got: dict[int, list[int]] = {}
    plans: dict[int, Entries] = {}
    while waiting or core.has_unfinished_requests():
        if waiting:
            number, prompt = waiting.pop(0)
            core.add_request(str(number), {"prompt_token_ids": prompt}, sampling(None, 60))
        one.pays(0.1 if len(waiting) % 2 else 2.0)
        for output in core.step():
            if output.finished:
                number = int(output.request_id)
                got[number] = [*output.outputs[0].token_ids]
                found = one.llm.collective_rpc("adaskip_plans", args=([(None, prompts[number])],))
                plans[number] = found[0][0]
    metrics = {each.name: getattr(each, "value", 0) for each in one.llm.get_metrics()}
    assert metrics["vllm:num_preemptions"] > 0
    assert len({str(plan) for plan in plans.values()}) == 2  # both verdicts were given
    for number, prompt in enumerate(prompts):
        want, _ = reference.generate(prompt, plans[number], 60, kv_fill="copy")
        assert got[number] == want


def test_plans_that_prompts_decide_are_guarded_once_they_were_read(
    engine: Callable[..., Any], tiny_llama: str, reference: Reference
) -> None:
    options = {"method": "adaskip", "max_compute": 0.6, "kv_fill": "project", "guard": True}
    one = Guarded(engine(tiny_llama, max_num_batched_tokens=48, **engine_args(**options)))
    prompts = random_prompts(33, 8)
    own = [METHOD.decide(0.6, reference.observe(prompt, METHOD)).entries() for prompt in prompts]
    for loop, decided in ((2.0, [[]] * 8), (0.5, own), (2.0, [[]] * 8)):
        one.pays(loop)
        want = [
            reference.generate(prompt, plan, TOKENS, kv_fill="project")[0]
            for prompt, plan in zip(prompts, decided, strict=True)
        ]
        assert greedy(one.llm, prompts, [None] * 8, TOKENS) == want


def test_costs_are_measured_at_start_up_where_vllm_compiles_and_before_the_first_step_else(
    engine: Callable[..., Any], tiny_llama: str, static: Guarded, reference: Reference
) -> None:
    compiled = Guarded(
        engine(tiny_llama, enforce_eager=False, **engine_args(**{**STATIC, "kv_fill": "project"}))
    )
    eager = Guarded(engine(tiny_llama, **engine_args(**STATIC)))
    assert eager.report()["measured_seconds"] == 0 < compiled.report()["measured_seconds"]
    prompts = random_prompts(34, 4)
    for one, fill in ((compiled, "project"), (eager, "copy")):
        got = greedy(one.llm, prompts, [None] * 4, TOKENS)
        costs = one.llm.apply_model(lambda model: model.adaskip.state.guard.costs.table)[0]
        assert costs.shape == (len(PARTS) + (one is compiled), 3) and (costs[:4] > 0).all()
        plans = one.llm.collective_rpc("adaskip_plans", args=([(None, p) for p in prompts],))[0]
        assert got == [
            reference.generate(prompt, plan, TOKENS, kv_fill=fill)[0]
            for prompt, plan in zip(prompts, plans, strict=True)
        ]
        assert sum(one.counted().values()) == 4
