# SPDX-License-Identifier: Apache-2.0
"""Which sequences the report counts under which plan."""

from __future__ import annotations

import numpy as np

from vllm_adaskip import DecoderShape
from vllm_adaskip.classifiers import PromptStatistics
from vllm_adaskip.engine.decide import SkipState
from vllm_adaskip.engine.request import EngineFacts, Planner

SHAPE = DecoderShape(8, 1, 3)
PROMPT = [1, 2, 3]


def state_of(facts: EngineFacts) -> SkipState:
    return SkipState(Planner(facts), 4)


def decide(state: SkipState, row: int) -> None:
    values = np.linspace(0.1, 1, state.planner.classifier.width)
    state.decide({row: PromptStatistics(3, values, values)})


def test_plans_are_counted_as_sequences_enter() -> None:
    state = state_of(EngineFacts(SHAPE, "static", {"skip": [3]}))
    for row, args in enumerate([None, {"adaskip": "off"}, {"adaskip_skip": []}]):
        state.enter(row, args, PROMPT, generated=0)
    assert state.plans == {"dense": 2, "skipping": 1, "gated": 0}


def test_who_comes_back_after_preemption_is_not_counted_again() -> None:
    state = state_of(EngineFacts(SHAPE))
    for generated in (0, 5):
        state.enter(0, {"adaskip_skip": [1]}, PROMPT, generated=generated)
    assert state.plans["skipping"] == 1


def test_who_waits_for_a_plan_is_counted_when_it_is_decided() -> None:
    state = state_of(EngineFacts(SHAPE, "adaskip"))
    for row in (0, 1):
        state.enter(row, {"adaskip_max_compute": 0.8}, PROMPT, generated=0)
    assert sum(state.plans.values()) == 0
    for row in (0, 1):
        decide(state, row)
    assert state.plans == {"dense": 0, "skipping": 2, "gated": 0}
    state.enter(2, {"adaskip_max_compute": 0.8}, PROMPT, generated=0)  # remembered
    assert state.plans["skipping"] == 3


def test_who_is_gated_counts_so_whatever_the_plan() -> None:
    state = state_of(EngineFacts(SHAPE, "ffn-skip", {"scope": "token"}))
    state.enter(0, None, PROMPT, generated=0)
    assert state.plans == {"dense": 0, "skipping": 0, "gated": 1}
