# SPDX-License-Identifier: Apache-2.0
"""The lens: vLLM's own norm and head, and which models it refuses to look through."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.models.utils import PPMissingLayer

from vllm_adaskip import engine_args
from vllm_adaskip.classifiers import Stream
from vllm_adaskip.engine.compat.head import Head

LOOKS = {"method": "adainfer", "check_layers": [2], "top_prob": 0.5, "vocabulary": "candidates"}


@pytest.fixture(scope="module")
def model(engine: Callable[..., Any], tiny_llama: str) -> Any:
    """The model of a running engine."""
    llm = engine(tiny_llama, **engine_args(**LOOKS, candidates=[1, 511]))
    return llm.llm_engine.model_executor.driver_worker.worker.get_model()


def test_after_the_last_layer_it_predicts_what_the_model_does(model: Any) -> None:
    before, update = torch.randn(2, 5, 128)
    with torch.inference_mode():
        hidden, _ = model.model.norm(update.clone(), before.clone())
        want = model.compute_logits(hidden)
        lens = Head(model, model.finish)
        assert torch.equal(lens(Stream(update, before)), want)
        few = lens(Stream(update, before), [7, 0, 511])
    assert torch.allclose(few, want[:, [7, 0, 511]], atol=1e-5)


def test_a_head_that_is_not_there_is_refused() -> None:
    for stage in (SimpleNamespace(lm_head=PPMissingLayer()), SimpleNamespace()):
        with pytest.raises(ValueError, match="no LM head here"):
            Head(stage, sum).check(None)


def test_ranks_that_would_see_other_logits_are_refused(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lens = Head(model, model.finish)
    lens.check(None)
    monkeypatch.setattr(model.lm_head, "tp_size", 2)
    lens.check(None)  # all gather
    with pytest.raises(ValueError, match="set option vocabulary to 'full'"):
        lens.check([1])
    monkeypatch.setattr(model.logits_processor, "use_all_gather", False)
    with pytest.raises(ValueError, match="--tensor-parallel-size"):
        lens.check(None)


def test_parts_of_a_quantised_head_are_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.lm_head, "quant_method", object())
    lens = Head(model, model.finish)
    lens.check(None)
    with pytest.raises(ValueError, match="not quantised"):
        lens.check(())


def test_candidates_that_do_not_exist_are_refused_at_start_up(
    engine: Callable[..., Any], tiny_llama: str
) -> None:
    with pytest.raises(ValueError, match=r"token 512 does not exist; allowed.*0 to 511"):
        engine(tiny_llama, **engine_args(**LOOKS, candidates=[3, 512]))
