# SPDX-License-Identifier: Apache-2.0
"""Ranks agree: with two tensor-parallel ranks, the same tokens and the same plans on both."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY_SHAPE
from helpers import adapters, quantised
from helpers.batches import Entries, random_prompts
from helpers.profiles import write_taught
from helpers.reference import Exit, MlpRule, Reference
from helpers.two_ranks import on_two_ranks

from vllm_adaskip import DecoderShape, bundled_model
from vllm_adaskip.classifiers.adaskip.method import AdaSkip
from vllm_adaskip.classifiers.ends import EndsOptions

#: None: decided by the method, from the prompt or token by token.
PLANS: list[Entries | None] = [[], [2, 3], ["attn:4", "mlp:5"], [0], None, ["mlp:0"], None, None]
TOKENS = 10
BUDGET = 0.6
METHOD = AdaSkip(DecoderShape(*TINY_SHAPE), EndsOptions())
#: Somebody else's, which every rank imports.
READING = {"method": "strangers:Theirs", "max_compute": BUDGET, "kv_fill": "project"}
GUARDED = {**READING, "method": "adaskip", "guard": True}
GATING = {"method": "ffn-skip", "scope": "token", "threshold": 0.9, "warm_up": 2}
EXITING = {
    "method": "adainfer",
    "scope": "token",
    "check_layers": [1, 2, 4, 6],
    "top_prob": 0.04,
    "gap": 0.01,
    "kv_fill": "copy",
}

#: Each rank drafts by its own clock, and asks the first.
DRAFTING = {"kv_fill": "copy", "draft": {"skip": ["mlp:3", "attn:5"], "tokens": 3}}
ALWAYS = {**DRAFTING, "draft": {**DRAFTING["draft"], "adapt": False}}

JOBS = {
    "reading": READING,
    "guarded": GUARDED,
    "gating": GATING,
    "exiting": EXITING,
    "drafting": DRAFTING,
    "always": ALWAYS,
}
#: Of the checkpoints that are no tiny Llama, or have adapters; all plans are explicit.
EXPLICIT: list[Entries] = [[], [2, 3], ["attn:4", "mlp:5"], [0], ["attn:1"], ["mlp:0"]]
PROMPTS = random_prompts(12, len(PLANS))
OTHERS = random_prompts(13, len(EXPLICIT), vocabulary=200)


class Ranks:
    """What two ranks did, and what they were to do it with."""

    def __init__(self, model: str, folder: Path) -> None:
        self.adapters = adapters.write(model, folder, 2)
        self.whose = [None, 0, 1, 1, None, 0]
        self.quantised, self.dequantised = quantised.write(bundled_model(), folder, "W8A8 int8")
        theirs = "from vllm_adaskip.classifiers.adaskip.method import AdaSkip as Theirs"
        (folder / "strangers.py").write_text(theirs)
        plain = {"model": model, "tokens": TOKENS, "engine": {"dtype": "float32"}}
        explicit = {"prompts": OTHERS, "plans": EXPLICIT, "options": {"kv_fill": "project"}}
        jobs: dict[str, dict[str, Any]] = {
            name: {**plain, "prompts": PROMPTS, "plans": PLANS, "options": options}
            for name, options in JOBS.items()
        }
        lora = {"dtype": "float32", "enable_lora": True, "max_loras": 3, "max_lora_rank": 8}
        paths = [None if one is None else self.adapters[one][0] for one in self.whose]
        jobs["adapters"] = {**plain, **explicit, "engine": lora, "adapters": paths}
        engine = {"dtype": "bfloat16"}
        jobs["quantised"] = {**plain, **explicit, "model": self.quantised, "engine": engine}
        self.taught = write_taught(folder / "taught", model, skip=EXPLICIT[1])
        options = {"kv_fill": "project", "profile": str(folder / "taught")}
        jobs["taught"] = {**plain, **explicit, "options": options}
        self.found = on_two_ranks(folder, jobs)


@pytest.fixture(scope="module")
def ranks(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    if (os.cpu_count() or 1) < 2:
        pytest.skip("two ranks need two cores")
    return Ranks(tiny_llama, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", JOBS)
def test_two_ranks_give_the_reference_s_tokens_and_equal_reports(
    tiny_llama: str, ranks: Ranks, name: str
) -> None:
    """Ranks that gated differently would wait for each other for ever, in an MLP's all-reduce."""
    options, found = JOBS[name], ranks.found[name]
    given, reports, decisions = found["given"], found["reports"], found["decisions"]
    reference = Reference(tiny_llama)
    assert given[0] == given[1]
    for number, (prompt, plan, tokens) in enumerate(
        zip(PROMPTS, PLANS, found["tokens"], strict=True)
    ):
        here, there = (each[number] for each in found["ran"])
        rule = exit = None
        gates = options in (GATING, EXITING)
        assert here == there and (here is None) == (plan is not None or not gates)
        if plan is None and options is GATING:
            plan, rule = [], MlpRule(range(1, TINY_SHAPE[0] - 1), 0.9, warm_up=2)
        if plan is None and options is EXITING:
            plan, exit = [], Exit([1, 2, 4, 6], 0.04, 0.01)
        if plan is None and "draft" in options:
            plan = []
        if plan is None and options is GUARDED:  # each judges by its own clock, and asks the first
            plan = given[0][number]
        if plan is None:
            plan = METHOD.decide(BUDGET, reference.observe(prompt, METHOD)).entries()
        fill = str(options.get("kv_fill", "none"))
        want, _ = reference.generate(prompt, plan, TOKENS, kv_fill=fill, rule=rule, exit=exit)
        assert tokens == want
        if rule is not None:
            assert here["tokens"] == 2 * (TOKENS - 1)
            assert sum(here["left_out"]) == 2 * sum(map(len, rule.left_out))
    guards = [one.pop("guard", None) for one in reports]
    drafted = [one.pop("drafts", {}) for one in reports]
    assert (
        len({str([one.get(key) for key in ("passes", "accepted", "off")]) for one in drafted}) == 1
    )
    assert options is not ALWAYS or min(drafted[0]["accepted"]) > 0
    assert len(reports) == 2 and reports[0] == reports[1]
    if options is GUARDED:
        counted = [[one[key] for key in ("followed", "slower", "margin")] for one in guards]
        assert counted[0] == counted[1] and sum(counted[0]) == 2 * PLANS.count(None)
    assert decisions[0] == decisions[1]
    assert options is not READING or decisions[0]


def test_taught_layers_are_split_between_ranks_as_the_model_s_own(
    tiny_llama: str, ranks: Ranks
) -> None:
    reference, found = Reference(tiny_llama, taught=ranks.taught), ranks.found["taught"]
    for prompt, plan, tokens in zip(OTHERS, EXPLICIT, found["tokens"], strict=True):
        assert tokens == reference.generate(prompt, plan, TOKENS, kv_fill="project")[0]


def test_each_row_has_its_adapter_on_both_ranks(tiny_llama: str, ranks: Ranks) -> None:
    references = {None: Reference(tiny_llama)}
    references |= {number: Reference(path) for number, (_, path) in enumerate(ranks.adapters)}
    rows = zip(OTHERS, EXPLICIT, ranks.whose, ranks.found["adapters"]["tokens"], strict=True)
    for prompt, plan, whose, tokens in rows:
        want, gap = references[whose].generate(prompt, plan, TOKENS, kv_fill="project")
        assert tokens == want, f"adapter {whose}, {plan}, smallest gap {gap:.2g}"


def test_quantised_weights_are_split_too(ranks: Ranks) -> None:
    reference, got = Reference(ranks.dequantised), ranks.found["quantised"]["tokens"]
    equal = quantised.equal("W8A8 int8", reference, OTHERS, EXPLICIT, got, "project")
    assert equal >= len(EXPLICIT) - 2
