# SPDX-License-Identifier: Apache-2.0
"""Codebooks and thresholds: chosen from scores, judged by what a server makes of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_adaskip.classifiers.first.fit.codebook import fit_codebook, plans_of
from vllm_adaskip.classifiers.first.fit.thresholds import share_skipped, with_thresholds
from vllm_adaskip.classifiers.first.method import FirstOptions

LAYERS = 8
OPTIONS = FirstOptions()


def of_kinds(count: int, kinds: int, seed: int = 0, layers: int = LAYERS) -> np.ndarray:
    """Return scores of prompts that are of a few kinds, with some noise."""
    rng = np.random.default_rng(seed)
    middles = rng.uniform(0.05, 0.95, (kinds, layers))
    noise = rng.normal(0, 0.02, (count, layers))
    return np.clip(middles[rng.integers(kinds, size=count)] + noise, 0.001, 0.999)


some_scores = st.builds(of_kinds, st.integers(1, 60), st.integers(1, 9), st.integers(0, 99))


@settings(max_examples=60)
@given(scores=some_scores, size=st.integers(0, 6), threshold=st.floats(0, 1), others=some_scores)
def test_what_is_snapped_goes_never_beyond_what_is_allowed(
    scores: np.ndarray, size: int, threshold: float, others: np.ndarray
) -> None:
    options = FirstOptions(threshold=threshold)
    codebook = fit_codebook(scores, np.ones(len(scores)), options, size)
    assert len(codebook) <= size and [] not in codebook
    assert len({tuple(plan) for plan in codebook}) == len(codebook)
    complete = options.model_copy(update={"codebook": codebook})
    for some in (scores, others):
        snapped = plans_of(some, complete)
        assert not (snapped & (some >= threshold)).any()
        assert not snapped[:, [0, -1]].any()
        assert len(np.unique(snapped, axis=0)) <= size + 1 or not size


def test_as_many_plans_as_prompts_have_lose_nothing() -> None:
    scores, weights = of_kinds(50, 3), np.ones(50)
    found = np.unique(plans_of(scores, OPTIONS), axis=0)
    codebook = fit_codebook(scores, weights, OPTIONS, 40)
    complete = OPTIONS.model_copy(update={"codebook": codebook})
    assert (plans_of(scores, complete) == plans_of(scores, OPTIONS)).all()
    for plan in found[found.any(1)]:
        assert np.flatnonzero(plan).tolist() in codebook


def test_few_plans_are_those_that_lose_least() -> None:
    """Two kinds of prompts, one plan: that of the kind that weighs more."""
    scores = np.full((10, LAYERS), 0.9)
    scores[:4, [2, 3]], scores[4:, [4]] = 0.1, 0.1
    options = FirstOptions(keep_first=2, keep_last=3)  # three layers, so the budgets ask for little
    for weight, plan in ((0.1, [4]), (9.0, [2, 3])):
        weights = np.where(np.arange(10) < 4, weight, 1.0)
        assert fit_codebook(scores, weights, options, 1) == [plan]
    assert fit_codebook(scores, weights, options, 0) == []


@pytest.mark.parametrize("budget", [0.9, 0.75, 0.6])
def test_a_budget_finds_plans_that_are_hardly_larger_than_it_asks(budget: float) -> None:
    scores = of_kinds(80, 4)
    options = FirstOptions(threshold=0.05)  # alone it leaves out next to nothing
    codebook = fit_codebook(scores, np.ones(80), options, 16)
    complete = options.model_copy(update={"codebook": codebook})
    snapped, free = (plans_of(scores, one, budget) for one in (complete, options))
    assert (snapped.mean(1) >= 1 - budget - 1e-9).all()
    assert (snapped & ~free).sum(1).mean() < 0.5  # layers beyond what the routers would name


@settings(max_examples=20)
@given(scores=some_scores, target=st.floats(0.05, 0.7), size=st.integers(0, 4))
def test_a_calibration_ascends_and_names_what_is_left_out(
    scores: np.ndarray, target: float, size: int
) -> None:
    weights = np.linspace(1, 3, len(scores))
    options = OPTIONS.model_copy(update={"codebook": fit_codebook(scores, weights, OPTIONS, size)})
    complete = with_thresholds(options, scores, weights, target)
    assert complete == FirstOptions.model_validate(complete.model_dump())
    thresholds, shares = np.array(complete.calibration).T
    assert (np.diff(thresholds) > 0).all() and (np.diff(shares) >= 0).all()
    for threshold, share in complete.calibration[::7]:
        there = options.model_copy(update={"threshold": threshold})
        assert share_skipped(plans_of(scores, there), weights) == pytest.approx(share, abs=1e-5)
    got = share_skipped(plans_of(scores, complete), weights)
    below = shares[thresholds <= complete.threshold].max()
    above = shares[thresholds >= complete.threshold].min()
    assert below - 1e-5 <= got <= above + 1e-5


def test_a_target_is_met_with_a_codebook_and_without() -> None:
    scores, weights = of_kinds(400, 40, layers=16), np.ones(400)
    for size in (0, 8):
        codebook = fit_codebook(scores, weights, OPTIONS, size)
        options = OPTIONS.model_copy(update={"codebook": codebook})
        for target in (0.15, 0.25, 0.4):
            complete = with_thresholds(options, scores, weights, target)
            assert share_skipped(plans_of(scores, complete), weights) == pytest.approx(
                target, abs=0.03
            )
    assert with_thresholds(OPTIONS, scores, weights, 0).threshold == 0.5
