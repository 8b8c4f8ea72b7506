# SPDX-License-Identifier: Apache-2.0
"""Where AdaInfer looks, when it is sure enough, and what figures it is given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.made_up_exits import LAYERS, made_up

from vllm_adaskip.classifiers.adainfer.fit.base import ExitFit
from vllm_adaskip.classifiers.adainfer.fit.cases import Bools, Cases
from vllm_adaskip.classifiers.adainfer.fit.check_layers import (
    check_cost,
    choose,
    first_exits,
    looked,
)
from vllm_adaskip.classifiers.adainfer.fit.fitted import fit_adainfer
from vllm_adaskip.classifiers.adainfer.fit.quality import stops
from vllm_adaskip.classifiers.adainfer.fit.settings import AdaInferSettings
from vllm_adaskip.classifiers.adainfer.method import AdaInfer, AdaInferOptions
from vllm_adaskip.classifiers.adainfer.rule_file import load_rule
from vllm_adaskip.classifiers.plan import DecoderShape

KINDS = ["svm", "crf", "threshold"]


def told(**options: Any) -> AdaInferSettings:
    return AdaInferSettings.model_validate(options)


@pytest.mark.parametrize("classifier", KINDS)
@pytest.mark.parametrize("agreement", [0.95, 0.99])
def test_those_who_stop_agree_as_often_as_asked(classifier: str, agreement: float) -> None:
    fitted = fit_adainfer(made_up(2000), told(classifier=classifier, agreement=agreement), 0.1)
    assert fitted.chosen.agreement >= agreement and fitted.chosen.worst_task >= agreement
    assert fitted.chosen.net > 0.05 and fitted.chosen.pruned > fitted.chosen.net
    assert float(fitted.metrics["agreement_of_stopped"]) > agreement - 0.03
    easy, hard, together = fitted.tasks
    assert (easy.task, hard.task, together.task) == ("easy", "hard", "all")
    assert easy.pruned > hard.pruned and easy.cases + hard.cases == together.cases == 400
    assert together.depth == pytest.approx(LAYERS * (1 - together.pruned))


@pytest.mark.parametrize("classifier", KINDS)
def test_a_server_stops_where_the_fit_says(tmp_path: Path, classifier: str) -> None:
    cases = made_up(600)
    fitted = fit_adainfer(cases, told(classifier=classifier, agreement=0.95), 0.1)
    fitted.rule.save(tmp_path)
    rule = load_rule(classifier, tmp_path)
    assert rule.layers == fitted.chosen.layers
    options = AdaInferOptions.model_validate({"classifier": classifier})
    AdaInfer(DecoderShape(LAYERS, 1, 1), options, tmp_path)
    last = stops(rule, cases)
    assert np.array_equal(last, stops(fitted.rule, cases)) and len(set(last)) > 2
    for case, want in zip(cases.features, last, strict=True):
        seen = np.zeros((1, 2))
        for layer in rule.layers:
            settled, seen = rule.settled(layer, case[layer][None], seen)
            if settled[0]:
                break
        else:
            layer = LAYERS - 1
        assert layer == want


@pytest.mark.parametrize("classifier", KINDS)
def test_examples_that_are_held_back_decide_nothing(classifier: str) -> None:
    cases = made_up(500)
    before = fit_adainfer(cases, told(classifier=classifier), 0.1)
    cases.agrees[:100, :-1] = False  # those that come first
    after = fit_adainfer(cases, told(classifier=classifier), 0.1)
    for name, values in before.rule.tensors().items():
        assert np.array_equal(values, after.rule.tensors()[name])
    assert before.chosen == after.chosen
    assert float(after.metrics["agreement_of_stopped"]) == 0


def test_a_task_that_loses_more_than_the_others_is_what_counts() -> None:
    cases = made_up(4000)
    rare = cases.samples % 25 == 0  # nearly as sure as others at layer 2, and always wrong
    top_prob = np.random.default_rng(1).uniform(0.85, 0.93, rare.sum())
    cases.features[rare, 2] = np.stack([top_prob, 2 * top_prob - 1], axis=-1)
    cases.agrees[rare, 2] = False
    misled = replace(cases, tasks=np.where(rare, "misled", cases.tasks))
    pooled = replace(cases, tasks=np.full(len(cases), "one"))
    settings = told(classifier="threshold", agreement=0.97, check_layers=[2])
    together, by_task = (fit_adainfer(one, settings, 0.1).chosen for one in (pooled, misled))
    assert together.agreement >= 0.97 and by_task.worst_task >= 0.97
    assert by_task.level > together.level and by_task.pruned < together.pruned


def test_an_agreement_of_1_is_met_as_nearly_as_there_is() -> None:
    fitted = fit_adainfer(made_up(1000), told(classifier="threshold", agreement=1.0), 0.05)
    assert fitted.chosen.agreement > 0.98


@pytest.mark.parametrize(("checks", "most"), [(0, LAYERS - 1), (1, 1), (2, 2)])
def test_at_most_so_many_layers_are_looked_after(checks: int, most: int) -> None:
    fitted = fit_adainfer(made_up(1000), told(checks=checks, agreement=0.9), 0.01)
    assert 1 <= len(fitted.rule.layers) <= most


@pytest.mark.parametrize("classifier", KINDS)
def test_layers_that_are_given_are_looked_after(classifier: str) -> None:
    settings = told(classifier=classifier, check_layers=[2, 4], agreement=0.9)
    fitted = fit_adainfer(made_up(1000), settings, 0.1)
    assert fitted.rule.layers == (2, 4)
    assert [one.layer for one in fitted.layers if one.is_checked] == [2, 4]


@pytest.mark.parametrize("classifier", KINDS)
def test_a_model_that_settles_at_its_end_alone_is_refused(classifier: str) -> None:
    """As SmolLM2 is with one-word answers: no layer before says the same."""
    cases = made_up(200)
    never = np.zeros_like(cases.agrees)
    never[:, -1] = True
    never[-7:, 2] = True
    with pytest.raises(ValueError, match="of 160 answers at most 7 are what they will be"):
        fit_adainfer(replace(cases, agrees=never), told(classifier=classifier), 0.1)


def test_looks_that_cost_more_than_they_save_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no check layer pays: .*\(9\.00 layers each\)"):
        fit_adainfer(made_up(500), told(), 9.0)


class Given(ExitFit):
    """Who stops is given."""

    def __init__(self, exits: Bools) -> None:
        self.layers, self._exits = tuple(range(exits.shape[1])), exits

    def exits(self, level: float) -> Bools:
        return self._exits

    def only(self, layers: Any) -> Any: ...

    def rule(self, level: float) -> Any: ...

    def save(self, folder: Path) -> None: ...


def cases_with(exits: Bools) -> Cases:
    return made_up(len(exits)).of(np.arange(len(exits)))


@pytest.mark.parametrize("cost", [0.0, 0.2, 1.0, 3.0])
def test_layers_are_chosen_by_what_they_save_less_what_they_cost(cost: float) -> None:
    draw = np.random.default_rng(2)
    # Nested, as real ones are nearly: who would stop at a layer would above it too.
    first = draw.choice(LAYERS, 200, p=[0.02, 0.3, 0.02, 0.4, 0.06, 0.2])
    exits = first[:, None] <= np.arange(LAYERS - 1)
    cases = cases_with(exits)

    def net(layers: tuple[int, ...]) -> float:
        last = first_exits(exits[:, list(layers)], layers, LAYERS)
        saved = sum(LAYERS - 1 - one for one in last)
        looks = sum(layer <= one for one in last for layer in layers)
        return float((saved - cost * looks) / (LAYERS * len(cases)))

    found = choose(cases, Given(exits), 0.9, 0, cost)
    assert found.net == pytest.approx(net(found.layers))
    subsets = [
        tuple(layer for layer in range(LAYERS - 1) if bits >> layer & 1)
        for bits in range(1 << (LAYERS - 1))
    ]
    assert found.net == pytest.approx(max(map(net, subsets)))
    assert len(found.layers) == {0.0: 5, 3.0: 0}.get(cost, len(found.layers))
    alone = choose(cases, Given(exits), 0.9, 1, cost)
    assert alone.net == pytest.approx(max(net(one) for one in subsets if len(one) <= 1))


def test_forwards_that_become_shorter_weigh_and_looks_do_not() -> None:
    cases = replace(cases_with(np.zeros((2, 1), dtype=np.bool_)), passes=np.array([1, 9]))
    cases.agrees[:] = True
    look = looked(cases, np.array([5, 2]), (2,), 0.9, 0.5)
    assert look.pruned == pytest.approx(9 * 3 / 60)
    assert look.net == pytest.approx((9 * 3 - 2 * 0.5) / 60)
    assert (look.stopped, look.agreement) == (0.5, 1.0)


def test_a_look_costs_what_the_head_weighs_against_a_layer() -> None:
    # Llama-2-7B: 4 projections of 4096 x 4096, 3 of 4096 x 11008; 32000 tokens.
    shape = DecoderShape(32, 4 * 4096**2, 3 * 4096 * 11008)
    assert check_cost(shape, 32_000, 4096) == pytest.approx(0.65, abs=0.005)
    assert check_cost(shape, 4, 4096) < 1e-4


@pytest.mark.parametrize(
    ("options", "examples", "message"),
    [
        ({}, 99, r"99 examples; allowed: 100 or more"),
        ({"check_layers": [3, 6]}, 100, r"--check-layers 3,6; allowed: ascending, from 0 to 4"),
        ({"check_layers": [5]}, 100, "--check-layers 5; .*after the last layer"),
        ({"check_layers": [-1]}, 100, "--check-layers -1"),
        ({"check_layers": [3, 2]}, 100, "--check-layers 3,2"),
        ({"check_layers": [2], "checks": 1}, 100, "do not go together"),
        ({"classifier": "crf", "kernel": "linear"}, 100, "goes with --classifier svm alone"),
    ],
)
def test_what_a_model_or_few_examples_cannot_do_is_refused(
    options: dict[str, Any], examples: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        told(**options).check(LAYERS, examples)
