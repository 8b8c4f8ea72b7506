# SPDX-License-Identifier: Apache-2.0
"""The option `coalesce_regret` in the engine: one plan for many, and what must hold all the same.

Each sequence's tokens must be those of the float32 loop under the plan that it was given.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import TINY_SHAPE
from helpers.batches import random_prompts, sampling
from helpers.profiles import write_first
from helpers.reference import Reference

from vllm_adaskip import DecoderShape, SkipPlan, engine_args
from vllm_adaskip.classifiers import Classifier
from vllm_adaskip.engine.coalesce import Undrawn, coalesced
from vllm_adaskip.engine.decide import _digest

Arguments = dict[str, Any] | None
Options = dict[str, Any]


@pytest.fixture(scope="module")
def options(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Options]:
    """Two ways in which random prompts get plans of their own, each within a budget."""
    profile = write_first(tmp_path_factory.mktemp("profile"), tiny_llama, threshold=0.0)
    return {
        "first": {"profile": profile, "max_compute": 0.7},
        "adaskip": {"method": "adaskip", "max_compute": 0.8},
    }


@pytest.fixture
def make(engine: Callable[..., Any], tiny_llama: str, reference: Reference) -> Callable[..., Any]:
    def make(options: Options, **more: Any) -> Coalescing:
        more = {"disable_log_stats": False, "block_size": 32, **more}
        return Coalescing(engine(tiny_llama, **more, **engine_args(**options)), options, reference)

    return make


class Coalescing:
    """An engine with the option, and the reference."""

    def __init__(self, llm: Any, options: Options, reference: Reference) -> None:
        self.llm = llm
        self.options = options
        self.reference = reference

    def decided(self) -> dict[bytes, SkipPlan]:
        memo = self.llm.apply_model(lambda model: model.adaskip.state.memo)[0]
        return {undecided.prompt_hash: decision for undecided, decision in memo.items()}

    def forget(self) -> None:
        self.llm.apply_model(lambda model: model.adaskip.state.memo.clear())

    @property
    def method(self) -> Classifier:
        return self.llm.apply_model(lambda model: model.adaskip.state.planner.classifier)[0]

    def undrawn(self, prompt: list[int]) -> Undrawn:
        method, budget = self.method, self.options["max_compute"]
        read = self.reference.observe(prompt, method)
        return Undrawn(method.decide(budget, read), budget, read)

    def own(self, prompt: list[int]) -> SkipPlan:
        return self.undrawn(prompt).own

    def report(self) -> dict[str, Any]:
        return self.llm.collective_rpc("adaskip_report")[0]

    def counter(self, name: str) -> float:
        metrics = {one.name: getattr(one, "value", 0) for one in self.llm.get_metrics()}
        return metrics[f"vllm:{name}"]

    def check(
        self, prompts: list[list[int]], arguments: list[Arguments], tokens: int = 12, **params: Any
    ) -> list[SkipPlan | None]:
        """Run a batch; give the decided plans, None where the request brought its own."""
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [sampling(None, tokens, extra_args=one, **params) for one in arguments],
            use_tqdm=False,
        )
        decided, plans = self.decided(), []
        for prompt, own, output in zip(prompts, arguments, outputs, strict=True):
            plan = None
            entries = (own or {}).get("adaskip_skip", [])
            if not own:
                plan = decided[_digest(prompt)]
                entries = plan.entries()
            want, _ = self.reference.generate(
                prompt, entries, tokens, kv_fill=self.options.get("kv_fill", "none")
            )
            assert list(output.outputs[0].token_ids) == want
            plans.append(plan)
        return plans


@pytest.mark.parametrize(("method", "chunk"), [("first", 256), ("first", 48), ("adaskip", 48)])
def test_at_1_sequences_share_one_plan(
    make: Callable[..., Any], options: dict[str, Options], method: str, chunk: int
) -> None:
    """Their prompts become complete together, or one after the other beside those that decode."""
    one = make({**options[method], "coalesce_regret": 1.0}, max_num_batched_tokens=chunk)
    prompts = random_prompts(91, 8, longest=60)
    assert len({one.own(prompt) for prompt in prompts}) > 4
    assert len({*one.check(prompts, [None] * 8, tokens=24)}) == 1
    assert one.report()["coalesced"] >= 4


def test_prompts_that_become_complete_together_are_drawn_together(
    make: Callable[..., Any], options: dict[str, Options]
) -> None:
    """Drawn one after the other they would be given other plans."""
    one = make({**options["first"], "coalesce_regret": 0.3})
    prompts = random_prompts(97, 8, longest=30)
    sequences = [one.undrawn(prompt) for prompt in prompts]
    shape, nobody = DecoderShape(*TINY_SHAPE), np.zeros((0, 16), dtype=np.bool_)
    want = coalesced(sequences, nobody, one.method, shape, 0.3)
    one_by_one: list[SkipPlan] = []
    for sequence in sequences:
        live = np.array([plan.mask() for plan in one_by_one], dtype=np.bool_).reshape(-1, 16)
        one_by_one += coalesced([sequence], live, one.method, shape, 0.3)
    assert one.check(prompts, [None] * 8) == want != one_by_one


def test_at_0_sequences_follow_their_own(
    make: Callable[..., Any], options: dict[str, Options]
) -> None:
    one = make({**options["first"], "coalesce_regret": 0.0})
    prompts = random_prompts(91, 8, longest=60)
    assert one.check(prompts, [None] * 8) == [one.own(prompt) for prompt in prompts]
    assert one.report()["coalesced"] == 0


def test_requests_with_plans_of_their_own_keep_them_and_are_followed(
    make: Callable[..., Any], options: dict[str, Options]
) -> None:
    one = make({**options["first"], "coalesce_regret": 1.0}, max_num_batched_tokens=64)
    prompts = random_prompts(92, 7, longest=60)
    explicit = SkipPlan.parse([2, 4, 6], 8)
    arguments: list[Arguments] = [{"adaskip_skip": explicit.entries()}, {"adaskip": "off"}]
    plans = one.check(prompts, [*arguments, *[None] * 5], tokens=40)
    assert {*plans[2:]} == {explicit}
    assert explicit not in [one.own(prompt) for prompt in prompts[2:]]


@pytest.mark.parametrize("kv_fill", ["none", "project"])
def test_a_preempted_sequence_goes_on_under_its_plan(
    make: Callable[..., Any], options: dict[str, Options], kv_fill: str
) -> None:
    """And finds no blocks that it, or another with its prompt, wrote under a plan."""
    one = make(
        {**options["first"], "kv_fill": kv_fill, "coalesce_regret": 0.4},
        num_gpu_blocks_override=12,
        max_num_batched_tokens=64,
    )
    prompts = random_prompts(94, 8, longest=40)
    first = one.check(prompts, [None] * 8, tokens=80)
    assert one.counter("num_preemptions") > 0 and one.report()["coalesced"] > 0
    one.forget()
    others: list[Arguments] = [{"adaskip_skip": [3, 4, 6]}] * 4
    again = one.check(random_prompts(95, 4, 40) + prompts, [*others, *[None] * 8], tokens=80)
    assert again[4:] != first


def test_blocks_of_another_s_plan_for_the_same_prompt_are_not_found(
    make: Callable[..., Any], options: dict[str, Options]
) -> None:
    """The same tokens after the same prompt within the same budget, but under two plans."""
    one = make({**options["first"], "kv_fill": "project", "coalesce_regret": 1.0})
    core = one.llm.llm_engine
    scheduler = core.engine_core.engine_core.scheduler
    rng = random.Random(96)
    prompt, other = ([rng.randrange(512) for _ in range(40)] for _ in range(2))
    plans = []
    for beside in (None, {"adaskip_skip": [1, 3, 5]}):
        one.forget()
        if beside:
            core.add_request(
                "beside", {"prompt_token_ids": other}, sampling(None, 150, extra_args=beside)
            )
            core.step()
        same = sampling(None, 100, allowed_token_ids=[7])
        core.add_request(f"same, {beside}", {"prompt_token_ids": prompt}, same)
        for _ in range(70):
            core.step()
        (plan,) = one.decided().values()
        plans.append(plan)
        if not beside:
            while core.has_unfinished_requests():
                core.step()
    assert plans[0] != plans[1]
    (request,) = [one for one in scheduler.running if "same" in one.request_id]
    scheduler.running.remove(request)
    scheduler._preempt_request(request, 0.0)
    scheduler.prev_step_scheduled_req_ids.clear()
    assert scheduler.kv_cache_manager.get_computed_blocks(request)[1] == 32  # of its prompt
    while core.has_unfinished_requests():
        core.step()
