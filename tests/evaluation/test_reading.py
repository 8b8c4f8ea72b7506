# SPDX-License-Identifier: Apache-2.0
"""What the whole model says of answers, by numbers; `test_runner` compares with transformers."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from evaluation.synthetic import DENSE, PLAIN, answer, summary

from vllm_adaskip.lab.evaluation.reading import measured


@dataclass
class Logprob:
    logprob: float


def step(**each: float) -> dict[int, Logprob]:
    return {int(token[1:]): Logprob(value) for token, value in each.items()}


def test_agreement_and_surprise_of_an_answer() -> None:
    steps = [step(t5=-0.1), step(t6=-2.0, t7=-0.5), step(t8=-1.0, t9=-1.0), step(t1=-0.2)]
    found = measured(steps, [5, 6, 8, 1])
    assert found == {"agreement": 0.75, "surprise": pytest.approx(1.5 / 4)}


def test_an_answer_that_did_not_fit_is_read_as_far_as_it_does() -> None:
    assert measured([step(t5=-0.1)], [5, 6]) == {"agreement": 1.0, "surprise": 0.0}
    assert measured([], [5]) == {"agreement": None, "surprise": None}


def test_a_setting_s_are_means_over_tokens() -> None:
    made = [
        answer(DENSE.name, "sum/0", 1.0, tokens=1, agreement=1.0, surprise=0.0),
        answer(DENSE.name, "sum/1", 1.0, tokens=3, agreement=1.0, surprise=0.01),
        answer(PLAIN.name, "sum/0", 1.0, [5], tokens=1, agreement=0.0, surprise=4.0),
        answer(PLAIN.name, "sum/1", 1.0, [5], tokens=3, agreement=1.0, surprise=0.0),
    ]
    found = summary(made)
    dense, plain = (one.reading for one in found.settings)
    assert dense and dense.surprise == pytest.approx(0.0075)
    assert plain and (plain.agreement, plain.surprise) == (pytest.approx(0.75), pytest.approx(1.0))


def test_answers_that_were_not_read_have_none() -> None:
    assert summary([answer(DENSE.name, "sum/0", 1.0)]).dense.reading is None
