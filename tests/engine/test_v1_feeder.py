# SPDX-License-Identifier: Apache-2.0
"""The feeder against vLLM's own `BatchUpdate`, and its way through vLLM's loader."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor import _load_logitsprocs_by_fqcns as load

from vllm_adaskip import DecoderShape
from vllm_adaskip.engine import naming, v1
from vllm_adaskip.engine.decide import shared_state
from vllm_adaskip.engine.request import EngineFacts
from vllm_adaskip.engine.table import SequenceTable

SHAPE = DecoderShape(4, attention_parameters=1, mlp_parameters=3)
CONFIG = EngineFacts(SHAPE, "static", {"skip": [1, "attn:2"]})


def fed_table(config: EngineFacts = CONFIG) -> tuple[Any, SequenceTable]:
    """Make a feeder by name, as vLLM does, and give it with the table the model would find."""
    (feeder_class,) = load([naming.class_path(v1.__name__, "V1Feeder", config)])
    vllm_config: Any = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context={}),
        scheduler_config=SimpleNamespace(max_num_seqs=8),
    )
    feeder: Any = feeder_class(vllm_config, torch.device("cpu"), False)
    return feeder, shared_state(vllm_config).table


def added(row: int, skip: list[int | str] | None, prompt: int, output: int = 0) -> Any:
    args = None if skip is None else {"adaskip_skip": skip}
    return row, SamplingParams(extra_args=args), [1] * prompt, [1] * output


def rows(table: SequenceTable) -> list[tuple[int, int]]:
    """``(prompt length, sub-layers left out)`` of the first rows."""
    counts = table.skips.sum(axis=1)
    return [(int(length), int(n)) for length, n in zip(table.prompt_lens, counts, strict=True)][:4]


def update(**changes: Any) -> BatchUpdate:
    return BatchUpdate(**{"batch_size": 4, "removed": [], "added": [], "moved": [], **changes})


def test_rows_are_added_replaced_removed_moved_and_swapped() -> None:
    feeder, table = fed_table()
    feeder.update_state(update(added=[added(0, [], 5), added(1, None, 6), added(2, [0], 7)]))
    assert rows(table) == [(5, 0), (6, 3), (7, 2), (0, 0)]
    swap = (0, 1, MoveDirectionality.SWAP)
    feeder.update_state(update(moved=[swap]))
    assert rows(table) == [(6, 3), (5, 0), (7, 2), (0, 0)]
    down = (2, 0, MoveDirectionality.UNIDIRECTIONAL)
    feeder.update_state(update(removed=[0], moved=[down]))
    assert rows(table) == [(7, 2), (5, 0), (0, 0), (0, 0)]
    feeder.update_state(update(added=[added(0, ["mlp:3"], 9)]))
    assert rows(table) == [(9, 1), (5, 0), (0, 0), (0, 0)]
    feeder.update_state(None)
    assert rows(table)[0] == (9, 1)


def test_a_sequence_that_comes_back_is_no_new_request() -> None:
    feeder, table = fed_table()
    feeder.update_state(update(added=[added(0, None, 5)]))
    feeder.update_state(update(removed=[0]))
    feeder.update_state(update(added=[added(0, None, 5, output=3)]))
    assert table.requests == 1


def test_two_feeders_of_one_class_fill_two_tables() -> None:
    (one, first), (_, second) = fed_table(), fed_table()
    one.update_state(update(added=[added(0, None, 5)]))
    assert rows(first)[0] == (5, 3) and rows(second)[0] == (0, 0)


def test_logits_pass_through_untouched() -> None:
    feeder, _ = fed_table()
    logits = torch.randn(2, 8)
    assert feeder.apply(logits) is logits and feeder.is_argmax_invariant()


def test_the_front_end_refuses_with_the_server_s_own_options() -> None:
    feeder, _ = fed_table()
    feeder.validate_params(SamplingParams(extra_args={"adaskip_max_compute": 0.7}))
    with pytest.raises(ValueError, match="method 'static'"):
        feeder.validate_params(SamplingParams(extra_args={"adaskip_max_compute": 0.6}))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nobody'"):
        v1.nobody  # noqa: B018
