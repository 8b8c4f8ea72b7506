# SPDX-License-Identifier: Apache-2.0
"""The differentiable skip: with hard gates it is what a server does, whatever the family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.fit_models import tiny
from helpers.reference import Reference
from torch import Tensor
from transformers import DynamicCache

from vllm_adaskip.classifiers.first.fit.gated import Gate, gated_logits, gated_loss
from vllm_adaskip.lab.fitting.samples import IGNORED, Batch, Sample, batch_of
from vllm_adaskip.lab.fitting.sub_layers import DecoderError, decoder_layers

CPU = torch.device("cpu")
FAMILIES = ["llama", "mistral", "opt", "qwen2", "qwen3"]
SAMPLES = [
    Sample("a", [5, 30, 17, 42, 9, 11, 12, 13], 4),
    Sample("b", [7, 8, 9, 50, 51], 3),
    Sample("c", [40, 41, 42, 43, 44, 45, 3], 1),
]
PLANS = [[1, 2], [3], [1, 3]]


def keeping(plans: list[list[int]], layers: int) -> Gate:
    kept = torch.ones(len(plans), layers)
    for row, plan in enumerate(plans):
        kept[row, plan] = 0
    return lambda layer, before: kept[:, layer]


def padded_on_the_right(samples: list[Sample]) -> Batch:
    left = batch_of(samples, CPU)
    shift = [int(row.argmax()) for row in left.real.int()]
    rolled = [
        torch.stack([row.roll(-by) for row, by in zip(part, shift, strict=True)])
        for part in (left.ids, left.real, left.prompt)
    ]
    return Batch(*rolled)


@torch.no_grad()
def served(model: Any, sample: Sample, plan: list[int]) -> Tensor:
    """Return the answer's logits: the prompt whole, then token by token without these layers."""
    cache = DynamicCache(config=model.config)
    prompt, fed = sample.ids[: -sample.answer], sample.ids[-sample.answer : -1]
    found = [model(torch.tensor([prompt]), past_key_values=cache).logits[0, -1]]
    layers = decoder_layers(model)
    own = {layer: layers[layer].forward for layer in plan}
    for layer in plan:
        layers[layer].forward = lambda hidden_states, **_: hidden_states
    try:
        for place, token in enumerate(fed, len(prompt)):
            position = torch.tensor([[place]])
            output = model(torch.tensor([[token]]), past_key_values=cache, position_ids=position)
            found.append(output.logits[0, -1])
    finally:
        for layer, forward in own.items():
            layers[layer].forward = forward
    return torch.stack(found)


@pytest.mark.parametrize("pad", [lambda samples: batch_of(samples, CPU), padded_on_the_right])
@pytest.mark.parametrize("family", FAMILIES)
def test_hard_gates_are_what_is_served(family: str, pad: Any) -> None:
    model, batch = tiny(family), pad(SAMPLES)
    with torch.no_grad():
        logits = gated_logits(model, batch, keeping(PLANS, 4))
        whole = gated_logits(model, batch, keeping([[]] * 3, 4))
    wanted = batch.labels[:, -logits.shape[1] :] != IGNORED
    for row, (sample, plan) in enumerate(zip(SAMPLES, PLANS, strict=True)):
        right = served(model, sample, plan)
        torch.testing.assert_close(logits[row][wanted[row]], right, atol=1e-4, rtol=1e-4)
        if len(right) > 1:
            assert not torch.allclose(whole[row][wanted[row]], right, atol=1e-2)


def test_hard_gates_are_what_the_reference_does(tiny_llama: str) -> None:
    reference = Reference(tiny_llama)
    prompts, plans = [[5, 300, 17, 42, 99], [7, 8, 9]], [[1, 3, 4, 6], [2, 5]]
    samples = []
    for prompt, plan in zip(prompts, plans, strict=True):
        tokens, gap = reference.generate(prompt, plan, 8)
        assert gap > 1e-3
        samples.append(Sample("", [*prompt, *tokens], 8))
    with torch.no_grad():
        logits = gated_logits(reference.model, batch_of(samples, CPU), keeping(plans, 8))
    assert [row.tolist() for row in logits.argmax(-1)] == [one.ids[-8:] for one in samples]


@pytest.mark.parametrize("family", FAMILIES)
def test_gates_of_one_change_nothing_to_the_bit_and_leave_no_hook(family: str) -> None:
    model, batch = tiny(family), batch_of(SAMPLES, CPU)
    with torch.no_grad():
        logits = gated_logits(model, batch, keeping([[]] * 3, 4))
        stock = model(
            batch.ids,
            attention_mask=batch.real.long(),
            position_ids=batch.positions,
            use_cache=False,
        ).logits
    assert torch.equal(logits, stock[:, -logits.shape[1] - 1 : -1])
    assert not any(layer._forward_hooks for layer in decoder_layers(model))


def test_gates_between_have_the_gradient_of_the_loss() -> None:
    model, batch = tiny("llama"), batch_of(SAMPLES, CPU)
    shares = torch.full((4, 3), 0.5, dtype=torch.float64, requires_grad=True)
    model = model.double()

    def loss(given: Tensor) -> Tensor:
        return gated_loss(model, batch, lambda layer, before: given[layer])

    # The loss is in float32, so no finer steps.
    assert torch.autograd.gradcheck(loss, (shares,), eps=1e-3, atol=2e-3)
    (gradient,) = torch.autograd.grad(loss(shares), shares)
    # The third answer is one token, which follows the prompt: no gate has a say in it.
    assert gradient[:, :2].abs().min() > 0 and not gradient[:, 2].any()


def test_a_model_whose_layers_cannot_be_told_is_refused() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    pair = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2, vocab_size=9)
    with pytest.raises(DecoderError, match=r"T5.*decoder-only"):
        decoder_layers(T5ForConditionalGeneration(pair))
    two = tiny("llama")
    two.other = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(4))
    with pytest.raises(DecoderError, match="2 lists of 4"):
        decoder_layers(two)
