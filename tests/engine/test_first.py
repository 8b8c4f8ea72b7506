# SPDX-License-Identifier: Apache-2.0
"""A whole profile of method ``first`` in the engine: routers, LoRA, budgets, and what it costs.

Decisions under chunks, prefix hits and preemption: `test_prompt_statistics`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY_LAYERS, TINY_SHAPE
from helpers.batches import greedy, random_prompts
from helpers.profiles import write_first, write_lora
from helpers.reference import Reference
from safetensors.torch import load_file, save_file

from vllm_adaskip import DecoderShape, SkipPlan, engine_args
from vllm_adaskip.config import AdaSkipConfig
from vllm_adaskip.engine.request import Planner


def test_lora_is_merged_and_the_routers_read_the_merged_model(
    engine: Callable[..., Any], tiny_llama: str, tmp_path: Path
) -> None:
    profile = write_first(tmp_path, tiny_llama, threshold=0.55, codebook=[[2, 4], [3], [5, 6]])
    reference = Reference(write_lora(tmp_path, tiny_llama))
    options = {"profile": profile, "kv_fill": "project"}
    facts = AdaSkipConfig.parse(options).facts(DecoderShape(*TINY_SHAPE))
    classifier = Planner(facts).classifier
    llm = engine(tiny_llama, **engine_args(**options))
    prompts = random_prompts(51, 12)
    got = greedy(llm, prompts, [None] * 12, max_tokens=10)
    plans = set()
    for prompt, tokens in zip(prompts, got, strict=True):
        plan = classifier.decide(1.0, reference.observe(prompt, classifier))
        plans.add(plan)
        assert tokens == reference.generate(prompt, plan.entries(), 10, kv_fill="project")[0]
    assert len(plans) > 2
    dense = greedy(llm, prompts[:2], [[], []], max_tokens=10)  # also dense: the merged model
    assert dense == [reference.generate(prompt, [], 10)[0] for prompt in prompts[:2]]
    (report,) = llm.collective_rpc("adaskip_report")
    assert report["method"] == "first"
    assert sum(report["attn_run"]) < TINY_LAYERS * report["decode_tokens"]


def test_a_decoding_step_under_a_decided_plan_is_that_of_an_explicit_one(
    engine: Callable[..., Any], tiny_llama: str, tmp_path: Path
) -> None:
    """It pays nothing for having been routed: the same step, and nothing observed."""
    llm = engine(
        tiny_llama, **engine_args(profile=write_first(tmp_path, tiny_llama), max_compute=0.6)
    )
    (prompt,) = random_prompts(52, 1)
    greedy(llm, [prompt], [None], max_tokens=3)
    (plan,) = llm.apply_model(lambda model: list(model.adaskip.state.memo.values()))[0]
    assert isinstance(plan, SkipPlan) and not plan.is_dense
    steps = []
    for plans in ([None], [plan.entries()]):
        greedy(llm, [prompt], plans, max_tokens=3)
        is_read, step = llm.apply_model(
            lambda model: (model.adaskip.reader.is_open, model.adaskip.step)
        )[0]
        assert not is_read
        steps.append(step.runs.tolist())
    assert steps[0] == steps[1]


def changed_json(folder: Path, **change: Any) -> None:
    path = folder / "adaskip.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def narrower(folder: Path) -> None:
    path = folder / "routers.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "weight": tensors["weight"][:, :-1].contiguous()}, path)


@pytest.mark.parametrize(
    ("tamper", "words"),
    [
        (lambda folder: changed_json(folder, fingerprint="0" * 16), ["fingerprint", "0" * 16]),
        (lambda folder: changed_json(folder, options={"threshold": 7}), ["threshold", "7"]),
        (lambda folder: changed_json(folder, options={"codebook": [[99]]}), ["99", "0 to 7"]),
        (lambda folder: changed_json(folder, method="evil"), ["evil", "allowed"]),
        (lambda folder: (folder / "routers.safetensors").unlink(), ["routers.safetensors"]),
        (narrower, ["routers.safetensors", "this model's routers"]),
    ],
    ids=["fingerprint", "option", "codebook", "method", "missing", "shape"],
)
def test_a_tampered_profile_stops_the_engine_at_start(
    engine: Callable[..., Any],
    tiny_llama: str,
    tmp_path: Path,
    tamper: Callable[[Path], None],
    words: list[str],
) -> None:
    write_first(tmp_path, tiny_llama)
    tamper(tmp_path)
    with pytest.raises(ValueError) as refusal:
        engine(tiny_llama, **engine_args(profile=str(tmp_path)))
    assert all(word in str(refusal.value) for word in words), refusal.value
