# SPDX-License-Identifier: Apache-2.0
"""Taught layers are for tokens that leave something out, and for no others.

Fails when a dense request notices them, when a token under a plan runs a layer as the checkpoint
has it, when a mixed step gives a row the other's weight, or when a prompt's K and V are not the
model's own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.batches import Entries, greedy, random_prompts, sampling
from helpers.families import Matrix
from helpers.profiles import write_taught
from helpers.reference import Reference
from torch import nn
from transformers import AutoModelForCausalLM

from vllm_adaskip import engine_args, request
from vllm_adaskip.engine.step import Step
from vllm_adaskip.engine.taught import Rows, Split
from vllm_adaskip.lab.fitting.draft import Draft, saved

TOKENS = 12
ONE: Entries = [1, "attn:2"]
OTHER: Entries = ["mlp:0", 3]


@pytest.fixture(scope="module")
def taught(few_layers: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Reference]:
    """A profile, and what it means."""
    folder = tmp_path_factory.mktemp("taught")
    return str(folder), Reference(few_layers, taught=write_taught(folder, few_layers, skip=ONE))


def check(llm: Any, reference: Reference, plans: list[Entries], **more: Any) -> None:
    prompts = random_prompts(len(plans), len(plans))
    want = [
        reference.generate(prompt, plan, TOKENS, **more)[0]
        for prompt, plan in zip(prompts, plans, strict=True)
    ]
    assert greedy(llm, prompts, plans, TOKENS) == want


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_each_row_runs_its_own_layers_in_every_mixture(
    engine: Callable[..., Any], few_layers: str, taught: tuple[str, Reference], eager: bool
) -> None:
    profile, reference = taught
    llm = engine(few_layers, enforce_eager=eager, **engine_args(profile=profile))
    plain = Reference(few_layers)
    for plans in ([ONE] * 5, [OTHER] * 3, [[]] * 4, [ONE, [], OTHER, [], ONE, OTHER, []] * 2):
        check(llm, reference, plans)
    prompt = random_prompts(9, 1)[0]
    assert reference.generate(prompt, ONE, TOKENS) != plain.generate(prompt, ONE, TOKENS)
    assert reference.generate(prompt, [], TOKENS) == plain.generate(prompt, [], TOKENS)
    (report,) = llm.collective_rpc("adaskip_report")
    assert eager or report["compiled"]["ran"] > 0


def test_a_dense_answer_is_stock_vllms_bit_for_bit(
    engine: Callable[..., Any], few_layers: str, taught: tuple[str, Reference]
) -> None:
    prompts = random_prompts(2, 6)

    def told(llm: Any) -> list[Any]:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [sampling([] if llm is ours else None, TOKENS, logprobs=3)] * 6,
            use_tqdm=False,
        )
        return [[(one.token_ids, one.logprobs) for one in each.outputs] for each in outputs]

    ours = engine(few_layers, **engine_args(profile=taught[0]))
    assert told(ours) == told(engine(few_layers))


def test_prompts_are_the_models_own_so_that_all_find_them(
    engine: Callable[..., Any], few_layers: str, taught: tuple[str, Reference]
) -> None:
    profile, reference = taught
    llm = engine(
        few_layers, enable_prefix_caching=True, block_size=32, **engine_args(profile=profile)
    )
    prompt = random_prompts(5, 1, longest=90)[0] * 90
    prompt = prompt[:90]
    for plan in (ONE, [], OTHER, []):
        outputs = llm.generate([{"prompt_token_ids": prompt}], sampling(plan, TOKENS))
        assert outputs[0].num_cached_tokens == (0 if plan is ONE else 64)
        assert list(outputs[0].outputs[0].token_ids) == reference.generate(prompt, plan, TOKENS)[0]


def test_a_prompt_before_its_tail_is_taught_too(
    engine: Callable[..., Any], few_layers: str, tmp_path: Path
) -> None:
    prompt_options = {"exit": 2, "tail": 5}
    merged = write_taught(tmp_path, few_layers, method="none", prompt=prompt_options)
    reference = Reference(few_layers, taught=merged)
    llm = engine(few_layers, **engine_args(profile=str(tmp_path)))
    for plans in ([[]] * 4, [ONE, []] * 3):
        check(llm, reference, plans, prompt_plan=([2, 3], 5))


def test_drafts_by_taught_layers_change_nothing(
    engine: Callable[..., Any], few_layers: str, taught: tuple[str, Reference]
) -> None:
    profile, reference = taught
    speculate = {"skip": OTHER, "tokens": 3, "adapt": False}
    llm = engine(few_layers, **engine_args(profile=profile, draft=speculate))
    for plans in ([[]] * 3, [ONE] * 3, [ONE, []] * 2):
        check(llm, reference, plans)
    (report,) = llm.collective_rpc("adaskip_report")
    assert report["drafts"]["drafted"] > 0


def test_trained_layers_draft_as_without_the_profile(
    engine: Callable[..., Any], few_layers: str, taught: tuple[str, Reference], tmp_path: Path
) -> None:
    whole = AutoModelForCausalLM.from_pretrained(few_layers, dtype=torch.float32)
    draft = Draft(whole, 3, None)
    saved(draft, tmp_path, few_layers, whole.config.to_dict(), {})
    speculate = {"profile": str(tmp_path), "tokens": 3, "adapt": False}
    accepted = []
    for options in ({}, {"profile": taught[0]}):
        llm = engine(few_layers, **engine_args(draft=speculate, **options))
        check(llm, taught[1], [[]] * 6)
        accepted.append(llm.collective_rpc("adaskip_report")[0]["drafts"]["accepted"])
    assert accepted[0] == accepted[1] and sum(accepted[0]) > 0


@pytest.mark.parametrize("name", ["gemma3", "opt, post-norm and projections", "phi3", "qwen3"])
def test_other_families(
    engine: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    families = Matrix(tmp_path_factory.mktemp("families"), engine)
    model, folder = families.checkpoint(name), tmp_path_factory.mktemp("taught")
    reference = Reference(model, taught=write_taught(folder, model, skip=ONE))
    llm = families.make(name, **engine_args(profile=str(folder)))
    check(llm, reference, [ONE, [], OTHER, []])
    check(llm, reference, [ONE] * 3)


def test_a_method_that_asks_for_a_plan_gets_taught_layers(
    engine: Callable[..., Any], few_layers: str, taught: tuple[str, Reference]
) -> None:
    profile, reference = taught
    llm = engine(few_layers, **engine_args(profile=profile))
    prompts = random_prompts(4, 3)
    arguments = [None, request(skip=[]), None]
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        [sampling(None, TOKENS, extra_args=each) for each in arguments],
        use_tqdm=False,
    )
    for prompt, plan, output in zip(prompts, (ONE, [], ONE), outputs, strict=True):
        assert list(output.outputs[0].token_ids) == reference.generate(prompt, plan, TOKENS)[0]


class Pair(nn.Linear):
    """Returns a tuple, as vLLM's linear layers do."""

    def forward(self, values: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return super().forward(values), None


@pytest.mark.parametrize("leaving", [[0, 0, 0], [1, 1, 1], [0, 1, 0], [1, 0, 1]])
@pytest.mark.parametrize("kind", [nn.Linear, Pair])
def test_rows_go_through_their_own_weight(leaving: list[int], kind: type[nn.Linear]) -> None:
    import numpy as np

    plain, own, rows = kind(4, 3), kind(4, 3), Rows()
    rows.begin(Step.of_decodes(np.array(leaving, dtype=bool)[:, None]), torch.device("cpu"))
    values = torch.randn(3, 4)
    found = Split(plain, own, rows)(values)
    want = torch.stack([nn.Linear.forward(own if is_own else plain, row)
                        for row, is_own in zip(values, leaving, strict=True)])  # fmt: skip
    assert isinstance(found, tuple) == (kind is Pair)
    torch.testing.assert_close(found[0] if kind is Pair else found, want)
