# SPDX-License-Identifier: Apache-2.0
"""When a step plan is made anew, and what is counted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_adaskip import DecoderShape, SkipPlan
from vllm_adaskip.engine.compat import share
from vllm_adaskip.engine.counts import report
from vllm_adaskip.engine.decide import SkipState
from vllm_adaskip.engine.loop import SkipRuntime
from vllm_adaskip.engine.request import EngineFacts, Planner

LAYERS = 3


class Forward:
    """A runtime with a table of two rows, and the step's metadata under the test's control."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *skips: list[int | str]) -> None:
        vllm_config: Any = SimpleNamespace(
            compilation_config=SimpleNamespace(static_forward_context={}),
            model_config=SimpleNamespace(get_hidden_size=lambda: 8),
            device_config=SimpleNamespace(device=torch.device("cpu")),
        )
        state = SkipState(Planner(EngineFacts(DecoderShape(LAYERS, 1, 3))), 4)
        self.table = state.table
        share(vllm_config, state)
        for row, skip in enumerate(skips):
            self.table.add(row, SkipPlan.parse(skip, LAYERS), prompt_len=5, is_new=True)
        layer: Any = SimpleNamespace(layer_name="attention", sliding_window=None)
        self.runtime = SkipRuntime(vllm_config, [layer], lens=None)
        self.metadata: Any = None
        monkeypatch.setattr(self.runtime.batches, "step_metadata", lambda: self.metadata)

    def run(self, query_lens: list[int], seq_lens: list[int]) -> Any:
        starts = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        self.metadata = SimpleNamespace(
            query_start_loc=starts, seq_lens=torch.tensor(seq_lens), block_table=None
        )
        step = self.runtime.begin()
        if step is not None:
            self.runtime.end()
        return step


def rows_of(plan: Any, sub_layer: int) -> int:
    return int(plan.counted[sub_layer])


def test_a_warm_up_has_no_plan_and_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Forward(monkeypatch, [1])
    assert step.runtime.begin() is None
    assert report(step.runtime.state)["decode_tokens"] == 0


def test_lengths_that_a_feeder_tells_serve_one_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under V2 a warm-up brings attention metadata too; what they hold is nobody's."""
    step = Forward(monkeypatch, [1])
    step.runtime.state.is_told_lengths = True
    step.runtime.state.lengths = np.array([0, 1]), np.array([6])
    assert rows_of(step.run([3], [3]), 2) == 0  # not the metadata's, a prompt
    assert step.run([1], [7]) is None
    assert report(step.runtime.state)["decode_tokens"] == 1


def test_prompts_and_dense_rows_need_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Forward(monkeypatch, [1], [])
    assert step.run([3, 2], [3, 5]) is None
    assert step.run([2, 1], [5, 6]) is None  # a chunk of a prompt beside a dense row's token
    assert step.run([1, 1], [6, 7]) is not None


def test_a_plan_is_kept_while_decoding_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Forward(monkeypatch, [1], [])
    assert step.run([1, 1], [6, 7]) is step.run([1, 1], [7, 8])


def test_rows_that_change_places_get_a_new_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Same lengths, same phases: only the table's version tells."""
    step = Forward(monkeypatch, [1], [])
    before = step.run([1, 1], [6, 6])
    step.table.swap(0, 1)
    after = step.run([1, 1], [7, 7])
    assert before.part(2).rows.tolist() == [1]
    assert after.part(2).rows.tolist() == [0]


def test_report_adds_up_over_dense_and_planned_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Forward(monkeypatch, [1, "mlp:2"], [])
    step.run([5, 4], [5, 4])
    step.run([1, 1], [6, 5])
    step.run([1, 1], [7, 6])
    assert report(step.runtime.state) == {
        "num_layers": LAYERS,
        "prompt_tokens": 10,
        "shortened_tokens": 0,
        "decode_tokens": 3,
        "attn_run": [3, 1, 3],
        "mlp_run": [3, 1, 1],
        "requests": 2,
        "method": "none",
        "live_rows": 2,
        "plans": {"dense": 0, "skipping": 0, "gated": 0},  # nobody entered through the state
        "live_plans": 2,
        "coalesced": 0,
        "failures": 0,
    }
