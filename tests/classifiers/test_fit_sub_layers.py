# SPDX-License-Identifier: Apache-2.0
"""Sub-layers of any family, seen and left out, against vLLM's meaning of a plan."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers.fit_models import tiny
from helpers.reference import Reference
from torch import Tensor

from vllm_adaskip.classifiers.plan import SkipPlan
from vllm_adaskip.lab.fitting.samples import Sample, answer_logits, batch_of
from vllm_adaskip.lab.fitting.sub_layers import DecoderError, decoder_layers, leaving_out, visited

CPU = torch.device("cpu")
FAMILIES = ["llama", "mistral", "opt", "qwen2", "qwen3"]
SAMPLES = [Sample("a", [5, 30, 17, 42, 9, 11, 12, 13], 4), Sample("b", [7, 8, 9, 50, 51], 3)]
PLANS = [["attn:1", "mlp:2"], [3, "mlp:0", "attn:6"]]


@torch.no_grad()
def test_plans_of_sub_layers_are_what_the_reference_does(tiny_llama: str) -> None:
    reference = Reference(tiny_llama)
    samples = []
    for prompt, plan in zip([[5, 300, 17, 42, 99], [7, 8, 9]], PLANS, strict=True):
        tokens, gap = reference.generate(prompt, plan, 8)
        assert gap > 1e-3
        samples.append(Sample("", [*prompt, *tokens], 8))
    batch = batch_of(samples, CPU)
    with visited(reference.model, leaving_out(batch, [SkipPlan.parse(one, 8) for one in PLANS])):
        logits = answer_logits(reference.model, batch)
    assert [row.tolist() for row in logits.argmax(-1)] == [one.ids[-8:] for one in samples]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_whoever_only_looks_changes_nothing_and_sees_the_stream_grow(family: str) -> None:
    model, batch = tiny(family), batch_of(SAMPLES, CPU)
    seen: list[tuple[int, Tensor, Tensor]] = []

    def look(sub_layer: int, before: Tensor, update: Tensor) -> Tensor:
        seen.append((sub_layer, before, update))
        return update

    stock = answer_logits(model, batch)
    with visited(model, look):
        assert torch.equal(answer_logits(model, batch), stock)
    assert [sub_layer for sub_layer, *_ in seen] == list(range(8))
    for (_, before, update), (_, after, _) in itertools.pairwise(seen):
        assert torch.equal(before + update, after) and update.abs().sum() > 0
    modules = list(model.modules())
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in modules)


def test_layers_that_are_no_sum_of_two_updates_are_refused() -> None:
    class Norming(torch.nn.Module):
        def __init__(self, layer: Any) -> None:
            super().__init__()
            self.self_attn, self.mlp, self.layer = layer.self_attn, layer.mlp, layer

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return torch.tanh(self.layer(*args, **kwargs))

    model, batch = tiny("llama"), batch_of(SAMPLES, CPU)
    layers = decoder_layers(model)
    layers[2] = Norming(layers[2])
    plans = [SkipPlan(4)] * 2
    with (
        pytest.raises(DecoderError, match="Norming: what it gives is not the stream"),
        visited(model, leaving_out(batch, plans)),
    ):
        answer_logits(model, batch)
    del layers[1].mlp
    with pytest.raises(DecoderError, match="no module mlp or fc2"), visited(model, print):
        pass
    assert not layers[0]._forward_hooks
