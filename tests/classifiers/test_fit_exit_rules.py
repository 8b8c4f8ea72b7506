# SPDX-License-Identifier: Apache-2.0
"""What is exported decides as the library does that it was trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.fit_models import own_answers, tiny
from helpers.made_up_exits import LAYERS, made_up
from hypothesis import given
from hypothesis import strategies as st

from vllm_adaskip.classifiers.adainfer.fit.base import (
    FOLDS,
    LEAST,
    above_others_cut,
    folds_of,
    least_cut,
)
from vllm_adaskip.classifiers.adainfer.fit.cases import Cases, exit_cases
from vllm_adaskip.classifiers.adainfer.fit.crf import (
    CrfFit,
    log_odds,
    observations,
    read,
    shifted,
    train,
)
from vllm_adaskip.classifiers.adainfer.fit.head import FinalHead
from vllm_adaskip.classifiers.adainfer.fit.svm import Kernel, SvmFit, exported
from vllm_adaskip.classifiers.adainfer.fit.svm import train as train_svm
from vllm_adaskip.classifiers.adainfer.fit.threshold import ThresholdFit
from vllm_adaskip.classifiers.adainfer.rule_file import load_rule
from vllm_adaskip.classifiers.adainfer.rules import Svm

CHAIN = (1, 3, 4)


def real() -> Cases:
    """Features of a small model, of the tokens of its own answers."""
    model = tiny("llama", layers=LAYERS)
    samples = own_answers(model, 24, length=6)
    head = FinalHead(model, samples[0].ids)
    return exit_cases(model, head, samples, "token", 8, lambda _: None)


@pytest.fixture(scope="module", params=["made up", "real"])
def cases(request: pytest.FixtureRequest) -> Cases:
    return real() if request.param == "real" else made_up(300)


@pytest.mark.parametrize("kernel", ["rbf", "linear"])
def test_an_exported_svm_decides_as_scikit_learn(
    tmp_path: Path, cases: Cases, kernel: Kernel
) -> None:
    machines = {
        layer: train_svm(cases.features[:, layer], cases.agrees[:, layer], kernel)
        for layer in (2, 4)
    }
    cuts = np.array([-0.3, 0.7])
    exported(machines, cuts).save(tmp_path)
    rule = load_rule("svm", tmp_path)
    assert isinstance(rule, Svm) and rule.layers == (2, 4)
    anything = np.random.default_rng(1).uniform(0, 1, (500, 2))
    for place, layer in enumerate(rule.layers):
        for points in (cases.features[:, layer], anything):
            want = machines[layer].decision_function(points) - cuts[place]
            assert np.allclose(rule.decision(layer, points), want, rtol=1e-9, atol=1e-9)
            settled, _ = rule.settled(layer, points, np.zeros((len(points), 2)))
            assert np.array_equal(settled, want >= 0) and 0 < settled.mean() <= 1


def test_an_exported_crf_has_crfsuites_marginals(tmp_path: Path, cases: Cases) -> None:
    import pycrfsuite

    crf = train(cases, CHAIN, path := tmp_path / "chain")
    crf.save(tmp_path)
    rule = load_rule("crf", tmp_path)
    tagger = pycrfsuite.Tagger()
    tagger.open(str(path))
    anything = np.random.default_rng(1).uniform(0, 1, (60, LAYERS, 2))
    features = np.concatenate([cases.features[:60], anything])
    seen = np.zeros((len(features), 2))
    for place, layer in enumerate(CHAIN):
        settled, seen = rule.settled(layer, features[:, layer], seen)
        chances = np.exp(seen[:, 1])
        for case, one in enumerate(features):
            # The server has not seen what is above: the chain so far is all there is.
            tagger.set(observations(one, CHAIN[: place + 1]))
            want = tagger.marginal("1", place)
            assert chances[case] == pytest.approx(want, abs=1e-5)
            if abs(want - 0.5) > 1e-4:  # CRFsuite tells six digits of each weight
                assert settled[case] == (want >= 0.5)
    assert 0 < settled.mean() < 1


@pytest.mark.parametrize("cut", [-2.0, 0.5, 3.0])
def test_a_cut_moves_decisions_of_a_crf_and_no_messages(
    tmp_path: Path, cases: Cases, cut: float
) -> None:
    crf = train(cases, CHAIN, tmp_path / "chain")
    odds = log_odds(crf, cases.features)
    moved = log_odds(shifted(crf, cut), cases.features)
    assert np.allclose(moved, odds - cut, atol=1e-9)


def test_a_crf_reads_every_weight(tmp_path: Path) -> None:
    crf = train(made_up(200), CHAIN, path := tmp_path / "chain")
    assert (crf.unary != 0).all() and (crf.transition != 0).all()
    assert np.array_equal(read(path, CHAIN).unary, crf.unary)


@given(
    st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.3, 0.7]), st.booleans()), min_size=1,
             max_size=200),
    st.sampled_from([0.3, 0.5, 0.9, 1.0]),
)  # fmt: skip
def test_a_cut_is_the_least_score_from_which_on_enough_agree(
    pairs: list[tuple[float, bool]], level: float
) -> None:
    scores, agrees = (np.array(each) for each in zip(*pairs, strict=True))
    enough = [
        score
        for score in np.unique(scores)
        if (above := scores >= score).sum() >= LEAST and agrees[above].mean() >= level
    ]
    cut = least_cut(scores, agrees, level)
    if not enough:
        assert cut == np.inf
    else:
        assert np.array_equal(scores >= cut, scores >= min(enough))


def test_nobody_is_judged_by_a_cut_of_its_own_fold() -> None:
    draw = np.random.default_rng(0)
    folds, scores = np.repeat(np.arange(FOLDS), 50), draw.uniform(0, 1, 250)
    agrees = scores > 0.5
    before = above_others_cut(scores, agrees, folds, 1.0)
    agrees[folds == 2] = draw.random(50) < 0.9
    after = above_others_cut(scores, agrees, folds, 1.0)
    assert np.array_equal(before[folds == 2], after[folds == 2]) and after[folds == 2].any()
    assert not np.array_equal(before[folds != 2], after[folds != 2])


def test_folds_keep_an_example_together_and_spread_tasks() -> None:
    cases = made_up(200, each=3)
    folds = folds_of(cases, 0)
    for fold in range(FOLDS):
        own = folds == fold
        assert not set(cases.samples[own]) & set(cases.samples[~own])
        assert 30 <= (cases.tasks[own] == "easy").sum() <= 90


@pytest.mark.parametrize("kernel", ["rbf", "linear"])
def test_a_layer_where_all_agree_still_says_no_to_what_is_no_prediction(kernel: Kernel) -> None:
    cases = made_up(300)
    cases.agrees[:, 4] = True
    fit = SvmFit(cases, folds_of(cases, 0), (4,), kernel, 0)
    assert fit.exits(0.99).mean() > 0.9
    rule = fit.rule(0.99)
    assert rule.settled(4, cases.features[:, 4], np.zeros((300, 2)))[0].mean() > 0.9
    unlike = np.array([[0.01, 0.0], [0.05, 0.01]])
    assert not rule.settled(4, unlike, np.zeros((2, 2)))[0].any()


@pytest.mark.parametrize("kind", ["svm", "crf", "threshold"])
def test_a_layer_where_nobody_agrees_cannot_be_exported(kind: str) -> None:
    cases = made_up(200)
    cases.agrees[:, 1] = False
    folds = folds_of(cases, 0)
    fit: Any = {
        "svm": lambda: SvmFit(cases, folds, (1,), "rbf", 0),
        "crf": lambda: CrfFit(cases, folds, (1,)),
        "threshold": lambda: ThresholdFit(cases, folds, (1,)),
    }[kind]()
    assert not fit.exits(0.9).any()
    with pytest.raises(ValueError, match=r"check layers? .*1.*no 30 examples are settled"):
        fit.rule(0.9)
