# SPDX-License-Identifier: Apache-2.0
"""The same random traffic through all feeders: every token gets the same plan.

V1's is told of its batch, or looks at it where drafts are made.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.v2_batches import ROWS, Plan, batch, request_data, v2_config
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from vllm_adaskip import DecoderShape, SkipPlan
from vllm_adaskip.engine import compat
from vllm_adaskip.engine.decide import SkipState
from vllm_adaskip.engine.request import EngineFacts, Planner
from vllm_adaskip.engine.step import Step
from vllm_adaskip.engine.v1 import PulledBatch, V1Feeder
from vllm_adaskip.engine.v2 import AdaSkipModelState

LAYERS = 4
FACTS = EngineFacts(DecoderShape(LAYERS, 1, 3), "static", {"skip": [1, "attn:2"]})


@dataclasses.dataclass
class Sequence:
    """A request as the scheduler sees it."""

    prompt: int
    plan: Plan
    computed: int = 0
    tokens: int = 0  # prompt and generated so far

    def __post_init__(self) -> None:
        self.tokens = self.prompt


class FedByV1:
    """The V1 runner's persistent batch: holes are filled, then closed from the end."""

    def __init__(self) -> None:
        self.state = SkipState(Planner(FACTS), ROWS)
        self._feeder: Any = V1Feeder.__new__(V1Feeder)
        self._feeder._state, self._feeder._table = self.state, self.state.table
        self._batch: list[str | None] = []

    def step(self, sequences: dict[str, Sequence], scheduled: dict[str, int]) -> list[str]:
        removed, added, moved = [], [], []
        for row, name in enumerate(self._batch):
            if name is not None and name not in scheduled:
                removed.append(row)
                self._batch[row] = None
        for name in scheduled:
            if name in self._batch:
                continue
            if None not in self._batch:
                self._batch.append(None)
            row = self._batch.index(None)
            self._batch[row], one = name, sequences[name]
            args = None if one.plan is None else {"adaskip_skip": one.plan}
            added.append(
                (row, SamplingParams(extra_args=args), [1] * one.prompt, [1] * self.generated(one))
            )
        while None in self._batch:
            if (last := self._batch.pop()) is not None:
                row = self._batch.index(None)
                self._batch[row] = last
                moved.append((len(self._batch), row, MoveDirectionality.UNIDIRECTIONAL))
        self._feeder.update_state(
            BatchUpdate(len(self._batch), removed=removed, added=added, moved=moved)
        )
        return [name for name in self._batch if name is not None]

    @staticmethod
    def generated(one: Sequence) -> int:
        return one.tokens - one.prompt


class Pulled(FedByV1):
    """The same batch, which is looked at before each step; nobody tells of changes."""

    def __init__(self) -> None:
        super().__init__()
        self.pulled = SkipState(Planner(FACTS), ROWS)
        self._now: dict[str, Sequence] = {}
        self.batch: list[str] = []
        self._source = PulledBatch(self.pulled, self)

    def request(self, request_id: str) -> Any:
        one = self._now[request_id]
        args = None if one.plan is None else {"adaskip_skip": one.plan}
        return SimpleNamespace(
            sampling_params=SamplingParams(extra_args=args),
            prompt_token_ids=[1] * one.prompt,
            output_token_ids=[1] * self.generated(one),
        )

    def step(self, sequences: dict[str, Sequence], scheduled: dict[str, int]) -> list[str]:
        self._now, self.batch = sequences, super().step(sequences, scheduled)
        self._source.update()
        return self.batch


class FedByV2:
    """Model Runner V2: slots stay, and each batch has its own order."""

    def __init__(self, vllm_config: Any) -> None:
        vllm_config.compilation_config.static_forward_context.clear()
        self.state = SkipState(Planner(FACTS), ROWS, is_told_lengths=True)
        compat.share(vllm_config, self.state)
        self._feeder = AdaSkipModelState(vllm_config, torch.nn.Module(), None, torch.device("cpu"))
        self._inside: set[str] = set()

    def step(
        self, sequences: dict[str, Sequence], scheduled: dict[str, int], gone: set[str]
    ) -> list[str]:
        for name in sorted(gone):
            self._feeder.remove_request(name)
        self._inside -= gone
        for slot, name in enumerate(scheduled):
            if name not in self._inside:
                one = sequences[name]
                data = request_data(name, one.prompt, one.tokens - one.prompt, one.plan)
                self._feeder.remove_request(name)
                self._feeder.add_request(slot, data)
                self._inside.add(name)
        computed = {name: sequences[name].computed for name in scheduled}
        self._feeder.preprocess_state(batch(computed, scheduled), (), None, torch.zeros(1))
        return [*scheduled]


def what_runs(
    state: SkipState, order: list[str], sequences: dict[str, Sequence], scheduled: dict[str, int]
) -> dict[str, tuple[int, int, tuple[bool, ...]]]:
    """Of each request: tokens in the step, generated ones, and what these leave out."""
    if state.is_told_lengths:
        assert state.lengths is not None
        starts, lengths = state.lengths
    else:
        starts = np.cumsum([0] + [scheduled[name] for name in order])
        lengths = np.array([sequences[name].computed + scheduled[name] for name in order])
    rows, skips = len(order), state.table.skips
    step = Step.of(starts, lengths, state.table.prompt_lens[:rows], skips[:rows])
    generated = np.bincount(step.row, step.length * step.generated, minlength=rows)
    return {
        name: (int(starts[row + 1] - starts[row]), int(generated[row]), tuple(skips[row]))
        for row, name in enumerate(order)
    }


PLANS: list[Plan] = [None, [], [0], ["mlp:3"], [1, 2], ["attn:0", "mlp:1"]]


@pytest.fixture(scope="module")
def fed_by_v2(tiny_llama: str) -> Callable[[], FedByV2]:
    vllm_config = v2_config(tiny_llama)
    return lambda: FedByV2(vllm_config)


@settings(max_examples=150)
@given(st.integers(0, 2**32), st.integers(5, 60))
def test_both_feeders_give_every_token_the_same_plan(
    fed_by_v2: Callable[[], FedByV2], seed: int, steps: int
) -> None:
    """Requests come in chunks, decode, are left out of steps, preempted, resumed and finished."""
    rng = random.Random(seed)
    v1, v2, pulled = FedByV1(), fed_by_v2(), Pulled()
    running: dict[str, Sequence] = {}
    waiting: dict[str, Sequence] = {}
    for step in range(steps):
        gone = {name for name in running if rng.random() < 0.15}
        for name in gone:
            one = running.pop(name)
            if rng.random() < 0.6:  # preempted; else finished or aborted
                one.computed = 0
                waiting[name] = one
        if rng.random() < 0.6:
            waiting[f"r{step}"] = Sequence(rng.choice([1, 1, 2, 5, 9]), rng.choice(PLANS))
        for name in list(waiting):
            if len(running) < ROWS and rng.random() < 0.7:
                running[name] = waiting.pop(name)
        chosen = [name for name in running if rng.random() < 0.85]
        rng.shuffle(chosen)
        scheduled = {
            name: rng.randint(1, one.tokens - one.computed)
            for name in chosen
            if (one := running[name])
        }
        if not scheduled:
            for name in gone:
                v2._feeder.remove_request(name)
            v2._inside -= gone
            continue
        first = what_runs(v1.state, v1.step(running, scheduled), running, scheduled)
        second = what_runs(v2.state, v2.step(running, scheduled, gone), running, scheduled)
        third = what_runs(pulled.pulled, pulled.step(running, scheduled), running, scheduled)
        assert first == second == third
        for name, tokens in scheduled.items():
            one = running[name]
            past = max(one.computed + tokens - one.prompt, 0)
            plan = SkipPlan.parse([1, "attn:2"] if one.plan is None else one.plan, LAYERS)
            assert second[name] == (tokens, min(past, tokens), tuple(plan.mask()))
            one.computed += tokens
            one.tokens += one.computed == one.tokens  # it was sampled from
