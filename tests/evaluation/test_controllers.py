# SPDX-License-Identifier: Apache-2.0
"""Skip controllers: what a gate does to the stream, what learns, and that a budget is reached."""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
from helpers.reference import Reference
from transformers import DynamicCache, LlamaForCausalLM

from vllm_adaskip.lab.testbed import network, tasks, tokenizer
from vllm_adaskip.lab.testbed.batches import IGNORED

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
study = import_module("skip_controllers")
Controllers, Prefix, Questions = study.Controllers, study.Prefix, study.Questions
TOKENIZER = tokenizer.build()
LAYERS, HIDDEN = 5, 64
KINDS = list(itertools.product((False, True), (False, True)))


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return network.create(TOKENIZER, LAYERS, HIDDEN).eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    yield
    torch.set_num_threads(before)


def some_questions() -> Questions:
    samples = [s for task in tasks.TASKS for s in tasks.samples(task, "train", 0, 2)]
    return study.collate(samples, TOKENIZER)


def some_controllers(per_sequence: bool, reads: bool, keep: float = 0.5) -> Controllers:
    return Controllers(LAYERS, HIDDEN, per_sequence=per_sequence, reads=reads, keep=keep)


def both(model: LlamaForCausalLM) -> tuple[Questions, Prefix]:
    questions = some_questions()
    return questions, study.read_prompts(model, questions)


def full_logits(model: LlamaForCausalLM, questions: Questions, row: int) -> torch.Tensor:
    """Return the answer's logits of one question, unpadded, from transformers' own forward."""
    prompt = questions.prompt[row][questions.real[row]]
    length = int((questions.labels[row] != IGNORED).sum())
    ids = torch.cat((prompt, questions.answer[row, :length]))
    return model(ids[None]).logits[0, len(prompt) :]


def test_always_keeping_is_the_full_model(model: LlamaForCausalLM) -> None:
    questions, prefix = both(model)
    dense, _ = study.answer(model, questions, prefix, study.fixed_gate(set(range(LAYERS))))
    for per_sequence, reads in KINDS:
        always = some_controllers(per_sequence, reads)
        always.bias.data[:, 0] = 1e4
        for mode in (True, False):
            logits, gates = study.answer(model, questions, prefix, always.train(mode).gate(prefix))
            assert gates.eq(1).all()
            assert torch.equal(logits, dense)  # bit for bit
    cache = DynamicCache(config=model.config)
    for layer, (keys, values) in enumerate(prefix.cached):
        cache.update(keys, values, layer)
    length = questions.answer.shape[1]
    continued = model(
        input_ids=questions.answer,
        attention_mask=torch.nn.functional.pad(questions.real.long(), (0, length), value=1),
        position_ids=questions.real.sum(1, keepdim=True) + torch.arange(length),
        past_key_values=cache,
    )
    assert torch.equal(dense, continued.logits)  # bit for bit
    for row in range(len(dense)):
        wanted = full_logits(model, questions, row)
        torch.testing.assert_close(dense[row, : len(wanted)], wanted, atol=1e-4, rtol=1e-4)


def test_skipping_means_what_a_plan_means(tiny_llama: str) -> None:
    reference = Reference(tiny_llama)
    prompt, skip = [5, 300, 17, 42, 99], [1, 3, 4, 6]
    tokens, _ = reference.generate(prompt, skip, 8)
    fed = Questions(
        prompt=torch.tensor([prompt]),
        real=torch.ones(1, len(prompt), dtype=torch.bool),
        first=torch.tensor(tokens[:1]),
        answer=torch.tensor([tokens[:-1]]),
        labels=torch.tensor([tokens[1:]]),
    )
    prefix = study.read_prompts(reference.model, fed)
    assert prefix.first_right.all()
    gate = study.fixed_gate(set(range(reference.num_layers)) - set(skip))
    with torch.no_grad():
        logits, _ = study.answer(reference.model, fed, prefix, gate)
    assert logits[0].argmax(-1).tolist() == tokens[1:]


def test_draws_are_exactly_nought_or_one() -> None:
    logits = torch.randn(100_000, 2, requires_grad=True)
    drawn = study.hard_gumbel(logits)
    assert (drawn.eq(0) | drawn.eq(1)).all()
    assert 0.45 < drawn.mean() < 0.55
    drawn.sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize(("per_sequence", "reads"), KINDS)
def test_gates(model: LlamaForCausalLM, per_sequence: bool, reads: bool) -> None:
    questions, prefix = both(model)
    one = some_controllers(per_sequence, reads)
    one.weight.data.normal_(std=0.1 if reads else 0.0)
    _, gates = study.answer(model, questions, prefix, one.gate(prefix))
    assert gates.shape == (LAYERS, *questions.answer.shape)
    assert (gates.eq(0) | gates.eq(1)).all()
    assert gates[[0, -1]].eq(1).all()  # the first and the last layer always run
    assert gates[1:-1].mean() < 1
    varies = (gates != gates[:, :, :1]).any()
    assert bool(varies) == (not per_sequence)
    # Without noise a static choice is the same for all, and one that reads is not.
    _, plain = study.answer(model, questions, prefix, one.eval().gate(prefix))
    assert bool((plain != plain[:, :1, :1]).any()) == reads


@pytest.mark.parametrize(("per_sequence", "reads"), KINDS)
def test_only_controllers_learn(model: LlamaForCausalLM, per_sequence: bool, reads: bool) -> None:
    questions, prefix = both(model)
    one = some_controllers(per_sequence, reads)
    logits, gates = study.answer(model, questions, prefix, one.gate(prefix))
    study.loss_of(logits, gates, questions.labels, 0.2).backward()
    assert one.bias.grad is not None
    assert one.bias.grad.abs().sum(1).gt(0).all()
    assert (one.weight.grad is not None) == reads
    assert all(parameter.grad is None for parameter in model.parameters())


def test_prompts_never_skip(model: LlamaForCausalLM) -> None:
    """Whatever answers skip, what they see of the prompt is the full model's."""
    questions, prefix = both(model)
    cached = [(keys.clone(), values.clone()) for keys, values in prefix.cached]
    study.answer(model, questions, prefix, study.fixed_gate({0, LAYERS - 1}))
    full = model(questions.prompt[:1][questions.real[:1]][None], output_hidden_states=True)
    for layer, (keys, values) in enumerate(prefix.cached):
        assert torch.equal(keys, cached[layer][0])
        assert torch.equal(values, cached[layer][1])
        real = keys[0][:, questions.real[0]]
        torch.testing.assert_close(
            real, full.past_key_values.layers[layer].keys[0], atol=1e-4, rtol=1e-4
        )
        torch.testing.assert_close(
            prefix.means[layer, 0], full.hidden_states[layer][0].mean(0), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize(("per_sequence", "reads"), KINDS)
def test_budget_is_reached(model: LlamaForCausalLM, per_sequence: bool, reads: bool) -> None:
    rng = random.Random(0)

    def draw() -> Questions:
        return study.collate([tasks.draw("sum", "train", rng) for _ in range(8)], TOKENIZER)

    one = some_controllers(per_sequence, reads, keep=0.95)
    study.train(model, [(one, 3 / LAYERS)], draw, steps=40, rates=(0.2, 0.001))
    questions = draw()
    prefix = study.read_prompts(model, questions)
    real = questions.labels != IGNORED
    sampled = [
        study.answer(model, questions, prefix, one.gate(prefix))[1][:, real].sum(0).mean().item()
        for _ in range(8)
    ]
    assert abs(sum(sampled) / 8 - 3) < 0.6  # it began at 4.85
    study.calibrate(model, questions, prefix, one, layers=3)
    _, gates = study.answer(model, questions, prefix, one.gate(prefix))
    assert gates[:, real].sum(0).mean().item() == pytest.approx(3, abs=0.15)
