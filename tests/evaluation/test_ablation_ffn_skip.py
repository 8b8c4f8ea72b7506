# SPDX-License-Identifier: Apache-2.0
"""What the ablation of FFN-SkipLLM compares: as many MLPs on every side, or as much compute."""

from __future__ import annotations

from collections import Counter

import numpy as np

from vllm_adaskip.classifiers import METHODS, DecoderShape, SkipPlan
from vllm_adaskip.classifiers.ffn_skip.ablate import (
    DRAWS,
    TARGETS,
    THRESHOLDS,
    WARM_UPS,
    settings,
)
from vllm_adaskip.lab.evaluation.ablation_plot import asked
from vllm_adaskip.lab.evaluation.results import Setting
from vllm_adaskip.lab.fitting.similarity import Similarities

SHAPE = DecoderShape(12, attention_parameters=1, mlp_parameters=2)


def compared() -> list[Setting]:
    curve = np.array([0.5, 0.9, 0.95, 0.96, 0.97, 0.99, 0.98, 0.975, 0.94, 0.93, 0.9, 0.6])
    values = np.repeat(curve, 2) + np.random.default_rng(0).normal(0, 0.01, (300, 24))
    found = Similarities(values, values, np.arange(300) % 9, np.ones(300, dtype=np.int64))
    mlps = [f"mlp:{layer}" for layer in (7, 3, 9, 4, 8, 2, 5)]
    return settings(found, mlps, [6, 3, 8, 5, 4], SHAPE)


def test_everything_leaves_out_what_it_is_asked_for() -> None:
    found = compared()
    assert found[0].name == "dense" and len({one.name for one in found}) == len(found)
    families = Counter(one.family for one in found)
    assert families["random"] == DRAWS * len(TARGETS)
    for family in ("by prompt", "by token", "static, most similar", "static, greedy", "AdaSkip"):
        assert families[family] == len(TARGETS)
    by_name = {one.name: one for one in found}
    assert by_name["static, most similar -25%"].skip == ["mlp:5", "mlp:6", "mlp:7"]
    assert by_name["static, greedy -15%"].skip == ["mlp:7", "mlp:3"]
    assert by_name["AdaSkip -25%"].budget == 1 - 0.25 * 2 / 3
    assert by_name["SLEB, layers -25%"].skip == [6, 3]
    for one in found[1:]:
        if one.skip is not None and not one.family.startswith("SLEB"):
            plan = SkipPlan.parse(one.skip, 12)
            assert plan.attention == 0 and not plan.mlp & (1 | 1 << 11)
            assert plan.mlp.bit_count() == round(float(asked(one).strip("-%")) * 0.12)
        METHODS[one.method].Options.model_validate(one.options)
    assert {asked(one) for one in found if one.family == "random"} == {
        f"-{target:.0%}" for target in TARGETS
    }


def test_ends_warm_ups_and_thresholds_are_taken_apart() -> None:
    by_name = {one.name: one.options for one in compared()}
    cold, none = by_name["by token -25%"], by_name["by token, no cold regions -25%"]
    assert cold["keep_first"] > 0 < cold["keep_last"] and cold["warm_up"] == 0
    assert (none["keep_first"], none["keep_last"]) == (0, 0)
    for tokens in WARM_UPS:
        assert by_name[f"warm-up {tokens} -25%"] == {**cold, "warm_up": tokens}
    swept = {
        (one["scope"], one["threshold"]) for name, one in by_name.items() if "threshold" in name
    }
    assert len(swept) == 2 * len(THRESHOLDS)
