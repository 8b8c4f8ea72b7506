# SPDX-License-Identifier: Apache-2.0
"""A real run of a method that decides token by token: what is stored is what really ran.

Against the float32 reference: each answer's share of compute, and which sub-layers how many of
its tokens left out. Fails when plans are stored in their place, when answers are mixed up or
take others' tokens along, and when the first token counts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from evaluation.test_harness import write as write_task
from helpers.reference import MlpRule, Reference
from transformers import AutoTokenizer

from vllm_adaskip import DecoderShape, bundled_model
from vllm_adaskip.classifiers.ffn_skip.method import FfnSkip, FfnSkipOptions
from vllm_adaskip.lab.data.items import Item
from vllm_adaskip.lab.data.sources import load_items
from vllm_adaskip.lab.evaluation.harness_engine import HarnessEngine
from vllm_adaskip.lab.evaluation.manifest import new_manifest, start_or_resume
from vllm_adaskip.lab.evaluation.report import make_report
from vllm_adaskip.lab.evaluation.results import Answer, Results, Setting
from vllm_adaskip.lab.evaluation.runner import Timed, Work, evaluate
from vllm_adaskip.lab.evaluation.settings import DENSE, decided
from vllm_adaskip.lab.evaluation.summary import summarise
from vllm_adaskip.lab.testbed.tasks import samples

LAYERS = 12
#: Of the bundled model: an MLP has twice the parameters of an attention.
SHAPE = DecoderShape(LAYERS, 1, 2)
OWN: dict[str, Any] = {"scope": "token", "threshold": 0.97, "warm_up": 1}
SETTINGS: list[Setting] = [DENSE, *decided("ffn-skip", OWN, [1.0, 0.9])]
ENGINE: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256}


@pytest.fixture(scope="module")
def items() -> list[Item]:
    """One question is asked twice; answers are read with perplexity too."""
    asked = load_items("bundled:sum,hop,translate,steps", limit=5)
    twice = Item("again/0", "again", asked[0].prompt, asked[0].references, "exact_match")
    read = [
        Item(f"read/{one.item}", "read", one.prompt, one.references, "perplexity")
        for one in asked[::5]
    ]
    return [*asked, twice, *read]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, items: list[Item]) -> Results:
    results = Results(tmp_path_factory.mktemp("run"))
    manifest = new_manifest(
        command="", model=bundled_model(), data={}, engine={}, settings=SETTINGS, seed=0
    )
    start_or_resume(results, manifest)
    timed = Timed(batch=4, tokens=4)
    evaluate(
        results, bundled_model(), SETTINGS, items, Work.left(results, SETTINGS, items, 0, timed),
        max_tokens=12, timed=timed, report=lambda *_: None,
        distributed_executor_backend="uni", **ENGINE,
    )  # fmt: skip
    return results


def follow(reference: Reference, prompt: list[int], budget: float, tokens: int) -> list[float]:
    """Return the shares of tokens that left out each sub-layer, by the reference."""
    plan = FfnSkip(SHAPE, FfnSkipOptions(**OWN)).decide(budget, None)
    rule = MlpRule(range(1, LAYERS - 1), OWN["threshold"], OWN["warm_up"])
    reference.generate(prompt, plan.entries(), tokens, rule=rule)
    counts = [0] * (2 * LAYERS)
    for each in rule.left_out:
        for layer in {layer for layer in range(LAYERS) if plan.mlp >> layer & 1} | set(each):
            counts[2 * layer + 1] += 1
    return [count / max(tokens - 1, 1) for count in counts]


def test_answers_have_what_their_own_tokens_left_out(results: Results, items: list[Item]) -> None:
    reference = Reference(bundled_model())
    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    prompts = {item.item: tokenizer.encode(item.prompt) for item in items}
    seen = set()
    for one in results.read(Answer):
        if one.setting == "dense":
            assert one.left_out is None and one.kept == 1
            continue
        assert one.left_out is not None and one.skip == []
        mlps = sum(one.left_out[1::2])
        assert one.kept == pytest.approx(1 - mlps * 2 / 3 / LAYERS)
        if one.metric == "exact_match":
            budget = float(one.setting.split()[-1])
            assert one.left_out == follow(reference, prompts[one.item], budget, one.tokens)
            seen.add(str(one.left_out))
    assert len(seen) > 15


def test_numbers_and_page_speak_of_tokens(results: Results) -> None:
    summary = summarise(results.manifest(), results.read(Answer), [])
    gated = summary.others[0]
    assert gated.plan is None and gated.by_token and 0.5 < gated.kept < 0.99
    own = [one for one in results.read(Answer) if one.setting == gated.name and one.task == "sum"]
    for sub_layer, share in enumerate(gated.plans["sum"].tolist()):
        shares = [one.left_out[sub_layer] for one in own if one.left_out]
        assert share == pytest.approx(sum(shares) / len(own))
    page = make_report(results, 0.01).html
    assert "of tokens leave it out" in page and "of sequences leave it out" not in page


def test_tasks_of_the_harness_too(tmp_path: Path) -> None:
    """Timed before: the same prompts and longer answers, which must not count."""
    write_task(tmp_path, "ours", samples("sum", "test", 7, 5))
    items = load_items("lm-eval:ours", limit=None, lm_eval_path=tmp_path)
    engine = HarnessEngine(bundled_model(), "ffn-skip", OWN, **ENGINE)
    reference = Reference(bundled_model())
    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    for setting in SETTINGS[1:]:
        engine.seconds(setting, [item.prompt for item in items], 40)
        for part in engine.answers(setting, items, 24):
            for one, item in zip(part, items, strict=True):
                prompt = tokenizer.encode(item.prompt)
                assert one.left_out == follow(reference, prompt, setting.budget, one.tokens)
                assert one.kept < 1
    engine.close()
