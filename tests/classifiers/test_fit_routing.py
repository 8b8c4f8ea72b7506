# SPDX-License-Identifier: Apache-2.0
"""Scores in the pass that gates answers are those that a server gets of the prompt alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.fit_models import own_answers, tiny
from torch import nn

from vllm_adaskip.classifiers import DecoderShape
from vllm_adaskip.classifiers.first.fit.gated import gated_logits
from vllm_adaskip.classifiers.first.fit.routing import Routing, prompt_scores, straight_through
from vllm_adaskip.classifiers.first.method import First, FirstOptions
from vllm_adaskip.classifiers.first.routers import Routers
from vllm_adaskip.lab.fitting.samples import batch_of

LAYERS = 4


def some_routers(width: int = 0) -> Routers:
    torch.manual_seed(1)
    routers = Routers(LAYERS, 32, width, start=0.5)
    nn.init.normal_(routers.weight, std=0.3)
    return routers


@pytest.mark.parametrize("reduce", ["mean", "fraction", "last"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_scores_are_what_a_server_reads_of_the_prompt(
    tmp_path: Path, family: str, reduce: str
) -> None:
    model, routers = tiny(family), some_routers(width=4)
    routers.save(tmp_path)
    samples = own_answers(model, 7)
    options = FirstOptions.model_validate({"reduce": reduce})
    found = prompt_scores(model, routers.requires_grad_(False), options, samples, batch=3)
    observe = First(DecoderShape(LAYERS, 1, 1), options, tmp_path).observer(32, torch.device("cpu"))
    for sample, scores in zip(samples, found, strict=True):
        prompt = torch.tensor([sample.ids[: -sample.answer]])
        with torch.no_grad():
            streams = model(prompt, output_hidden_states=True).hidden_states[:LAYERS]
        values = torch.zeros(prompt.shape[1], LAYERS)
        for layer, stream in enumerate(streams):
            observe(2 * layer, stream[0], stream[0], values)
        wanted = values[-1] if reduce == "last" else values.double().mean(0)
        np.testing.assert_allclose(scores[1:-1], wanted[1:-1], atol=1e-5)
        assert (scores[[0, -1]] == 1).all()  # never asked, so never below a threshold


@pytest.mark.parametrize("reduce", ["mean", "fraction", "last"])
def test_only_routed_layers_learn_and_the_ends_always_run(reduce: str) -> None:
    model, routers = tiny("llama"), some_routers()
    batch = batch_of(own_answers(model, 5), torch.device("cpu"))
    options = FirstOptions.model_validate({"reduce": reduce})
    seen: list[torch.Tensor] = []

    def never(score: torch.Tensor) -> torch.Tensor:
        seen.append(score)
        return straight_through(torch.zeros_like(score), score)

    logits = gated_logits(model, batch, Routing(routers, options, batch, never))
    assert len(seen) == LAYERS - 2
    logits.logsumexp(-1).sum().backward()
    assert routers.weight.grad is not None
    moved = routers.weight.grad.abs().sum(1) > 0
    assert moved.tolist() == [False, True, True, False]


def test_straight_through_is_exactly_what_was_decided() -> None:
    soft = torch.rand(1000, requires_grad=True)
    hard = straight_through(soft > 0.5, soft)
    assert (hard.eq(0) | hard.eq(1)).all()
    (2 * hard).sum().backward()
    assert soft.grad is not None and soft.grad.eq(2).all()
