# SPDX-License-Identifier: Apache-2.0
"""Known plans run compiled where all rows follow one, and mean what they mean in the loop.

Fails when a plan runs another's code, when a step that mixes plans runs compiled, or when the
compiler drops what a fill needs, or writes over it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_LAYERS
from helpers.batches import Entries, greedy, random_prompts, sampling
from helpers.reference import Reference

from vllm_adaskip import engine_args, request
from vllm_adaskip.classifiers import SkipPlan
from vllm_adaskip.engine.compiled import MOST, CompiledPlans, Headed, Pieces, logger
from vllm_adaskip.engine.prompt_plan import PromptPlan, exit_of, exit_plan
from vllm_adaskip.engine.step import Step

ONE: Entries = [1, "attn:2"]
OTHER: Entries = [0, "mlp:1", "attn:3"]
TOKENS = 10


def plan(entries: Entries) -> SkipPlan:
    return SkipPlan.parse(entries, TINY_LAYERS)


class NoFill:
    def begin(self, step: Step, *, may_change: bool) -> None: ...

    def abandon(self) -> None: ...


def made(count: int) -> CompiledPlans:
    plans = [plan([layer]) for layer in range(count)]
    return CompiledPlans(plans, lambda mask: lambda ids, *_: ids * int(np.flatnonzero(mask)[0]))


def test_each_plan_has_its_own_code_and_what_is_not_one_plan_has_none() -> None:
    plans = made(3)
    one, two = (Step.of_one_plan(plan([layer]).mask(), 3) for layer in (1, 2))
    assert plans.of(one) is None  # not compiled yet
    ids = torch.arange(20)
    plans.compile(NoFill(), {}, ids, ids, None)  # type: ignore[arg-type]
    bodies = [plans.of(step) for step in (one, two)]
    assert [body(ids[:1] + 1, ids[:1], None).tolist() for body in bodies] == [[2], [4]]  # type: ignore[union-attr,misc]
    assert plans.of(Step.of_one_plan(plan([5]).mask(), 3)) is None
    rows, ones = np.arange(3), np.ones(2, dtype=np.int64)
    masks = np.stack([plan([1]).mask(), plan([2]).mask()])
    assert plans.of(Step.of(rows, ones + 1, ones, masks)) is None
    assert plans.of(Step.of(np.array([0, 2, 3]), ones + 1, ones, masks[[0, 0]])) is None  # a prompt


def test_plans_that_are_missed_are_named_the_most_frequent_first() -> None:
    compiled, ids = made(1), torch.arange(20)
    compiled.compile(NoFill(), {}, ids, ids, None)  # type: ignore[arg-type]
    followed: list[tuple[Entries, int]] = [([1], 2), ([0, 2], 3), ([0], 4), ([], 5)]
    for layers, steps in followed:  # the third is known, the last is dense
        for _ in range(steps):
            compiled.miss(Step.of_one_plan(plan(layers).mask(), 3))
    mixed = np.stack([plan([1]).mask(), plan([2]).mask()])
    compiled.miss(Step.of_decodes(mixed))
    assert compiled.wanted() == [{"plan": [0, 2], "steps": 3}, {"plan": [1], "steps": 2}]


def test_a_few_are_compiled() -> None:
    plans, ids = made(MOST + 2), torch.arange(20)
    plans.compile(NoFill(), {}, ids, ids, None)  # type: ignore[arg-type]
    assert len(plans) == MOST


def test_a_plan_that_cannot_be_compiled_runs_in_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []  # not by caplog: once vLLM has set up its loggers, they keep to themselves
    monkeypatch.setattr(logger, "warning", lambda text, *of: said.append(text % of))

    def broken(ids: torch.Tensor, *_: Any) -> torch.Tensor:
        return ids if ids.sum().item() > 3 else ids + 1  # depends on data: no whole graph

    plans, ids = CompiledPlans([plan([1])], lambda mask: broken), torch.arange(20)  # type: ignore[arg-type,return-value]
    plans.compile(NoFill(), {}, ids, ids, None)  # type: ignore[arg-type]
    assert len(plans) == 0 and plans.of(Step.of_one_plan(plan([1]).mask(), 3)) is None
    assert "'skip 1' runs layer by layer, as it cannot be compiled" in "".join(said)


def prompts_step(stops: Entries, answer: Entries, whole_from: int = 4) -> Step:
    """Lay out a prompt of 6 tokens, of which some stop, beside two sequences that decode."""
    return Step.of(
        np.array([0, 6, 7, 8]),
        np.array([6, 9, 9]),
        np.array([6, 4, 4]),
        np.stack([plan(answer).mask()] * 3),
        shortened=(np.array([whole_from, 0, 0]), np.stack([plan(stops).mask()] * 3)),
    )


def test_pieces_are_for_steps_in_which_prompts_stop_and_nothing_else_is_left_out() -> None:
    def first(
        ids: torch.Tensor,
        positions: torch.Tensor,
        _: None,
        going: torch.Tensor,
        other: torch.Tensor,
    ) -> Headed:
        return Headed(ids[going], ids[going] + 1, positions[going], [(ids[other], ids[other])])

    def rest(update: torch.Tensor, before: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return update + before

    plans = CompiledPlans(
        [], lambda mask: rest, PromptPlan(exit_plan(2, TINY_LAYERS)),  # type: ignore[arg-type,return-value]
        lambda exit: Pieces(exit, TINY_LAYERS, first, rest),
    )  # fmt: skip
    stops: Entries = [*range(2, TINY_LAYERS)]
    assert plans.pieces_of(prompts_step(stops, [])) is None  # not compiled yet
    ids, places = torch.arange(20), torch.arange(20) * 2
    plans.compile(NoFill(), {}, ids, places, None)  # type: ignore[arg-type]
    pieces = plans.pieces_of(prompts_step(stops, []))
    assert pieces is not None and pieces.exit == 2 and len(plans) == 1
    going, other = torch.tensor([1, 4, 5]), torch.tensor([0, 2])
    found = pieces.first(ids[:6], places[:6], None, going, other)
    assert pieces.rest(*found[:3]).tolist() == [3, 9, 11]
    assert found.positions.tolist() == [2, 8, 10] and found.passed[0][0].tolist() == [0, 2]
    for step in (
        prompts_step(stops, [1]),
        prompts_step(stops[1:], []),
        prompts_step(["attn:2", *stops[1:]], []),
        prompts_step(stops, [], whole_from=1),
        prompts_step(stops, [], whole_from=0),
        Step.of_one_plan(plan(stops).mask(), 3),
    ):
        assert plans.pieces_of(step) is None


@pytest.mark.parametrize("entries", [["attn:7"], [3], [6, "mlp:7"], ["mlp:7"]])
def test_other_prompt_plans_than_exits_are_not_compiled(entries: Entries) -> None:
    assert exit_of(plan(entries)) is None
    assert exit_of(plan([6, 7])) == 6


@pytest.mark.parametrize("kv_fill", ["copy", "project"])
def test_compiled_plans_give_the_tokens_of_the_reference_and_fill_what_the_loop_fills(
    engine: Callable[..., Any], few_layers: str, kv_fill: str
) -> None:
    options = engine_args(kv_fill=kv_fill, known_plans=[ONE, OTHER])
    llm = engine(few_layers, enforce_eager=False, num_gpu_blocks_override=40, **options)
    reference, prompts = Reference(few_layers), random_prompts(3, 6)

    def ran(plans: list[Entries]) -> int:
        """Compare with the reference; return how many steps ran compiled."""
        before = report(llm)["ran"]
        got = greedy(llm, prompts, plans, max_tokens=TOKENS)
        want = [
            reference.generate(prompt, one, TOKENS)[0]
            for prompt, one in zip(prompts, plans, strict=True)
        ]
        assert got == want
        return int(report(llm)["ran"] - before)

    assert report(llm)["plans"] == 2
    assert ran([ONE] * 6) == ran([OTHER] * 6) == TOKENS - 1
    assert ran([ONE, OTHER] * 3) < 3  # where one sequence is left
    before = report(llm)["wanted"]
    assert ran([[]] * 6) == ran([[2]] * 6) == 0
    assert [one for one in report(llm)["wanted"] if one not in before] == [
        {"plan": [2], "steps": TOKENS - 1}
    ]
    compiled, loop = (filled(llm, prompts, known) for known in (True, False))
    for layer, (one, other) in enumerate(zip(compiled, loop, strict=True)):
        assert one.any() and torch.allclose(one, other, atol=1e-4), layer


def filled(llm: Any, prompts: list[list[int]], compiled: bool) -> list[torch.Tensor]:
    """Return each layer's K/V after answers under `ONE`, sorted, as blocks may be others."""

    def start(model: Any) -> None:
        if not compiled:
            model.adaskip.state.compiled = None
        for layer in model.adaskip.cache._layers:
            layer.kv_cache.zero_()

    llm.apply_model(start)
    greedy(llm, prompts, [ONE] * len(prompts), max_tokens=TOKENS)
    read = llm.apply_model(lambda model: [one.kv_cache for one in model.adaskip.cache._layers])
    return [torch.sort(one.flatten()).values for one in read[0]]


@pytest.mark.parametrize("kv_fill", ["none", "copy"])
def test_prompts_that_stop_run_compiled_and_mean_what_they_mean_in_the_loop(
    engine: Callable[..., Any], few_layers: str, kv_fill: str
) -> None:
    """Beside sequences that decode, in chunks, with tails that a chunk cuts."""
    options = engine_args(kv_fill=kv_fill, prompt={"exit": 2, "tail": 5})
    llm = engine(
        few_layers, enforce_eager=False, num_gpu_blocks_override=60, max_num_batched_tokens=48,
        **options,
    )  # fmt: skip
    reference, prompts = Reference(few_layers), random_prompts(5, 9, longest=90)
    assert report(llm)["plans"] == 1

    def answers(**more: Any) -> tuple[list[list[int]], int]:
        """Return them, and how many steps ran compiled."""
        before = report(llm)["ran"]
        own = [sampling(None, max_tokens=TOKENS + at % 3, **more) for at in range(9)]
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        found = llm.generate(asked, own, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in found], report(llm)["ran"] - before

    def wanted(**more: Any) -> list[list[int]]:
        return [
            reference.generate(prompt, [], TOKENS + at % 3, **more)[0]
            for at, prompt in enumerate(prompts)
        ]

    found, ran = answers()
    assert found == wanted(prompt_plan=([2, 3], 5)) and found != wanted()
    assert ran > 5
    for other in (request(off=True), request(prompt_exit=3)):
        assert answers(extra_args=other)[1] == 0, other
    assert answers(extra_args=request(skip=[1]))[1] < ran  # where no sequence decodes yet


def report(llm: Any) -> dict[str, Any]:
    found: dict[str, Any] = llm.collective_rpc("adaskip_report")[0]["compiled"]
    return found
