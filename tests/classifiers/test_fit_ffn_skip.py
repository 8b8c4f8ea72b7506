# SPDX-License-Identifier: Apache-2.0
"""Cold regions and thresholds, by the same rules that a server follows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.fit_models import own_answers, tiny
from helpers.reference import Reference
from hypothesis import given
from hypothesis import strategies as st

from vllm_adaskip.classifiers import DecoderShape, PromptStatistics
from vllm_adaskip.classifiers.adaskip.method import AdaSkip
from vllm_adaskip.classifiers.ends import EndsOptions
from vllm_adaskip.classifiers.ffn_skip.fit import (
    FfnSkipSettings,
    Fitted,
    fit_ffn_skip,
    mlps_left_out,
)
from vllm_adaskip.classifiers.ffn_skip.method import FfnSkip, FfnSkipOptions
from vllm_adaskip.lab.evaluation.sweep import Sample
from vllm_adaskip.lab.fitting.similarity import Similarities, similarities

LAYERS = 6
SHAPE = DecoderShape(LAYERS, attention_parameters=1, mlp_parameters=3)
row = st.lists(st.sampled_from([0.2, 0.5, 0.8, 0.9]), min_size=LAYERS, max_size=LAYERS)


@given(
    st.lists(row, min_size=1, max_size=4),
    st.sampled_from([0.0, 0.5, 0.85, 1.0]),
    st.none() | st.integers(1, 6),
    st.integers(0, 2),
    st.integers(0, 2),
)
def test_sequences_leave_out_what_the_method_decides(
    rows: list[list[float]], threshold: float, max_skip: int | None, first: int, last: int
) -> None:
    options = FfnSkipOptions(
        threshold=threshold, max_skip=max_skip, keep_first=first, keep_last=last
    )
    method = FfnSkip(SHAPE, options)
    inner = slice(first, LAYERS - last)
    for values, got in zip(rows, mlps_left_out(np.array(rows), options), strict=True):
        seen = np.array(values[inner])
        assert (
            got.tolist()
            == method.decide(1.0, PromptStatistics(1, seen, seen)).mask()[1::2].tolist()
        )


@given(
    st.lists(row, min_size=1, max_size=4),
    st.sampled_from([0.0, 0.5, 0.85, 1.0]),
    st.none() | st.integers(1, 6),
)
def test_tokens_leave_out_all_that_follows_the_first_that_has_saturated(
    rows: list[list[float]], threshold: float, max_skip: int | None
) -> None:
    options = FfnSkipOptions(scope="token", threshold=threshold, max_skip=max_skip)
    for values, got in zip(rows, mlps_left_out(np.array(rows), options), strict=True):
        want, is_on = [False] * LAYERS, False
        for layer in range(1, LAYERS - 1):
            if is_on and sum(want) < (max_skip or LAYERS):
                want[layer] = True
            is_on = is_on or values[layer] >= threshold
        assert got.tolist() == want


def made_up(cases: int = 400) -> Similarities:
    """Layers 2 to 5 of eight hardly do anything, a little more or less for each case."""
    curve = np.array([0.2, 0.9, 0.97, 0.99, 0.98, 0.96, 0.85, 0.5])
    draw = np.random.default_rng(0)
    values = np.repeat(curve, 2) + draw.normal(0, 0.01, (cases, 16))
    ages = np.arange(cases) % 10
    return Similarities(values, values, ages, np.ones(cases, dtype=np.int64))


@pytest.mark.parametrize("scope", ["sequence", "token"])
@pytest.mark.parametrize("target", [0.1, 0.25, 0.35])
def test_the_target_is_met_in_the_middle_that_the_curve_shows(scope: Any, target: float) -> None:
    found = made_up()
    told = FfnSkipSettings(target_skip=target, method=FfnSkipOptions(scope=scope, warm_up=3))
    fitted = fit_ffn_skip(found, told)
    assert fitted.skipped == pytest.approx(target, abs=0.02)
    options = fitted.options
    assert options.keep_first >= 2 and options.keep_last >= 2  # the curve's ends are cold
    left_out = mlps_left_out(found.prompts[:, 1::2][found.ages >= 3], options)
    assert left_out.mean() == pytest.approx(fitted.skipped, abs=0.02)
    assert np.allclose(fitted.by_layer[[0, 1, 6, 7]], 0)
    for threshold, share in options.calibration[::9]:
        there = options.model_copy(update={"threshold": threshold})
        got = mlps_left_out(found.prompts[:, 1::2], there).mean()
        assert got == pytest.approx(share, abs=0.02)
    served = FfnSkipOptions.model_validate({**options.model_dump(), "target_skip": 0.05})
    assert served.resolved_threshold() > options.threshold


def test_ends_that_are_given_are_kept_as_they_are() -> None:
    told = FfnSkipSettings(target_skip=0.5, keep_first=0, keep_last=3)
    options = fit_ffn_skip(made_up(), told).options
    assert (options.keep_first, options.keep_last) == (0, 3)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"target_skip": 0.8}, r"target_skip 0\.8; allowed here: up to 0\.75"),
        ({"target_skip": 0.3, "keep_first": 5}, r"allowed here: up to 0\.25"),
        ({"method": {"max_skip": 1}}, r"allowed here: up to 0\.125"),
        ({"method": {"scope": "token", "warm_up": 10}}, "warm_up 10: .*at most 10 tokens"),
    ],
)
def test_what_cannot_be_met_is_refused(told: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_ffn_skip(made_up(), FfnSkipSettings.model_validate(told))


def test_all_alike_leave_out_what_was_asked_for_or_more() -> None:
    flat = np.full((5, 16), 0.9)
    found = Similarities(flat, flat, np.zeros(5, dtype=np.int64), np.ones(5, dtype=np.int64))
    fitted: Fitted = fit_ffn_skip(found, FfnSkipSettings(target_skip=0.25))
    assert fitted.skipped == 0.75  # all or nothing is possible here


def test_prompts_are_measured_as_a_server_reads_them(tiny_llama: str) -> None:
    reference = Reference(tiny_llama)
    samples = [Sample("", [5, 300, 17, 42, 99, 7, 8], 2), Sample("", [9, 8, 300, 4], 1)]
    done: list[int] = []
    found = similarities(reference.model, samples, 2, done.append)
    method = AdaSkip(DecoderShape(8, 1, 1), EndsOptions())
    for one, got in zip(samples, found.prompts, strict=True):
        want = reference.observe(one.ids[: -one.answer], method).mean
        assert np.allclose(got, want, atol=1e-5)
    assert done == [2] and found.weights.tolist() == [1, 0] and found.ages.tolist() == [0]


@given(st.integers(1, 5))
def test_tokens_are_measured_whatever_the_batch(batch: int) -> None:
    model = tiny("llama")
    samples = own_answers(model, 5)
    whole, parts = (similarities(model, samples, size, lambda _: None) for size in (5, batch))
    assert np.allclose(whole.prompts, parts.prompts, atol=1e-5)
    assert sorted(whole.ages.tolist()) == sorted(parts.ages.tolist()) == sorted([0, 1, 2] * 5)
    keys = [np.lexsort(np.round(each.tokens, 4).T) for each in (whole, parts)]
    assert np.allclose(whole.tokens[keys[0]], parts.tokens[keys[1]], atol=1e-3)
