# SPDX-License-Identifier: Apache-2.0
"""What the ablation of AdaInfer compares, and exits that fall to anybody."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_adaskip.classifiers import METHODS
from vllm_adaskip.classifiers.adainfer.ablate import (
    answer_settings,
    generation_settings,
    rows,
)
from vllm_adaskip.lab.evaluation.results import Answer

LAYERS = 4


def answer(setting: str, number: int, score: float, depth: int = LAYERS) -> Answer:
    left_out = [float(layer >= depth) for layer in range(LAYERS) for _ in range(2)]
    return Answer(
        setting=setting, item=f"sum/{number}", task="sum", metric="exact_match", score=score,
        kept=depth / LAYERS, skip=[], tokens=1, text="",
        left_out=None if depth == LAYERS else left_out,
    )  # fmt: skip


def test_every_setting_can_be_served() -> None:
    found = answer_settings({"svm": Path("a"), "svm, from sum": Path("b")}, LAYERS)
    assert [one.name for one in found][:3] == ["dense", "svm", "svm, from sum"]
    assert [one.options["layers"] for one in found[3:]] == [1, 2, 3]
    for one in found[3:]:
        METHODS[one.method].Options.model_validate(one.options)
    texts = generation_settings({"svm by prompt": Path("p")}, {"svm by token": Path("t")}, LAYERS)
    assert {one.name: one.options.get("kv_fill") for one in texts if one.method == "adainfer"} == {
        "svm by prompt": None,
        "svm by token, copy": "copy",
        "svm by token, project": "project",
    }
    assert [one.skip for one in texts if one.family == "exit"] == [[2, 3], [3]]


def test_random_exits_are_as_many_at_each_depth() -> None:
    answers = [answer("dense", number, 1.0) for number in range(4)]
    # Two of four stop after layer 1 and are right, because those are the easy ones.
    answers += [answer("svm", number, 1.0, depth=1 if number < 2 else 4) for number in range(4)]
    answers += [answer("exit 1/4", number, float(number < 2), depth=1) for number in range(4)]
    (found,) = rows(answers, LAYERS)
    assert (found.setting, found.task, found.score) == ("svm", "sum", 1.0)
    assert found.pruned == pytest.approx(0.5 * 0.75)
    assert found.at_random == pytest.approx((0.5 + 0.5 + 1 + 1) / 4)
    assert found.loss.mean == 0 and found.loss.high > 0
