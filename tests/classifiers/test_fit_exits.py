# SPDX-License-Identifier: Apache-2.0
"""What a model would say after each layer, against a plain forward of transformers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.fit_models import VOCABULARY, own_answers, tiny

from vllm_adaskip.classifiers.adainfer.fit.cases import Cases, Scope, exit_candidates, exit_cases
from vllm_adaskip.classifiers.adainfer.fit.head import FinalHead
from vllm_adaskip.lab.fitting.samples import Sample
from vllm_adaskip.lab.fitting.sub_layers import DecoderError

FAMILIES = ["llama", "opt", "qwen3"]


def cases_of(
    model: Any, samples: list[Sample], scope: Scope, named: list[int] | None = None
) -> Cases:
    head = FinalHead(model, samples[0].ids)
    return exit_cases(model, head, samples, scope, 4, lambda _: None, named)


def samples_of(model: Any) -> list[Sample]:
    """Answers of the model's own, every third with a wrong last token; one of one token."""
    samples = own_answers(model, 10)
    for place in range(0, 10, 3):
        ids = samples[place].ids
        samples[place] = Sample("wrong", [*ids[:-1], ids[-1] % (VOCABULARY - 1) + 1], 4)
    return [*samples, Sample("short", samples[1].ids[:6], 1)]


@torch.no_grad()
def depth_logits(model: Any, ids: list[int]) -> np.ndarray:
    """Return ``[layers, tokens, vocabulary]``, as one reads it in transformers' documentation."""
    output = model(torch.tensor([ids]), output_hidden_states=True)
    decoder = model.model
    norm = decoder.norm if hasattr(decoder, "norm") else decoder.decoder.final_layer_norm
    # The last hidden state has been through the norm already; the first is the embedding.
    logits = [model.lm_head(norm(one)) for one in output.hidden_states[1:-1]]
    return torch.cat([*logits, output.logits]).double().numpy()


def plain(model: Any, one: Sample, scope: Scope, named: list[int] | None) -> list[tuple[Any, ...]]:
    """Return features, agreement, right, passes of each case of a sample."""
    logits = depth_logits(model, one.ids)
    best = logits.argmax(-1)
    chosen = logits if named is None else logits[..., named]
    chances = np.exp(chosen) / np.exp(chosen).sum(-1, keepdims=True)
    two = np.sort(chances, axis=-1)[..., ::-1]
    seen = np.stack([two[..., 0], two[..., 0] - two[..., 1]], axis=-1)
    first = len(one.ids) - one.answer - 1  # its last prompt token
    at = range(first, len(one.ids) - 1)
    same = {p: best[:, p] == best[-1, p] for p in at}
    right = {p: best[:, p] == one.ids[p + 1] for p in at}
    if scope == "answer":
        return [(seen[:, first], same[first], right[first], 1)]
    if scope == "token":
        return [(seen[:, p], same[p], right[p], 1) for p in at[1:]]
    if one.answer == 1:
        return []
    together = np.all([right[p] for p in at[1:]], axis=0) & right[first][-1]
    return [(seen[:, first], np.all([same[p] for p in at[1:]], axis=0), together, one.answer - 1)]


@pytest.mark.parametrize("scope", ["answer", "prompt", "token"])
@pytest.mark.parametrize("family", FAMILIES)
def test_features_and_labels_are_those_of_a_plain_forward(family: str, scope: Scope) -> None:
    model = tiny(family)
    samples = samples_of(model)
    for named in (None, [3, 9, 17, 40]):
        found = cases_of(model, samples, scope, named)
        want = [
            (number, one.task, *case)
            for number, one in enumerate(samples)
            for case in plain(model, one, scope, named)
        ]
        numbers, tasks, seen, same, right, passes = zip(*want, strict=True)
        assert found.samples.tolist() == list(numbers) and found.tasks.tolist() == list(tasks)
        assert np.allclose(found.features, seen, atol=1e-5)
        assert np.array_equal(found.agrees, same) and np.array_equal(found.right, right)
        assert found.passes.tolist() == list(passes)
        assert not found.agrees[:, :-1].all() and found.agrees[:, -1].all()
        assert not found.right[:, -1].all() or scope == "answer"


def test_candidates_are_the_answers_tokens_where_the_scope_looks() -> None:
    samples = [Sample("", [1, 2, 7, 8, 9], 3), Sample("", [1, 5, 7], 1)]
    assert exit_candidates(samples, "answer") == exit_candidates(samples, "prompt") == [7]
    assert exit_candidates(samples, "token") == [8, 9]


def test_an_answer_is_right_in_any_of_its_forms() -> None:
    """The model says something else than the reference's token, but begins another form of it."""
    model = tiny("llama")
    own = own_answers(model, 4)
    said = [one.ids[-one.answer] for one in own]
    assert 1 not in said
    wrong = [
        replace(one, ids=[*one.ids[: -one.answer], 1, *one.ids[len(one.ids) - one.answer + 1 :]])
        for one in own
    ]
    forms = [
        replace(one, begins=frozenset({token})) for one, token in zip(wrong, said, strict=True)
    ]
    assert not cases_of(model, wrong, "answer").right[:, -1].any()
    assert cases_of(model, forms, "answer").right[:, -1].all()
    assert not cases_of(model, forms, "token").right[:, -1].all()
    assert exit_candidates(forms, "answer") == sorted({1, *said})


def test_answers_of_one_token_have_nothing_to_decode() -> None:
    model = tiny("llama")
    short = [Sample("", one.ids[:5], 1) for one in own_answers(model, 4)]
    with pytest.raises(ValueError, match="scope 'prompt': all answers are of one token"):
        cases_of(model, short, "prompt")


def test_a_projection_after_the_norm_is_found() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "opt", vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
        ffn_dim=64, word_embed_proj_dim=16, max_position_embeddings=64, init_std=0.2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    head = FinalHead(model, [5, 6, 7])
    assert head.weights == (64, 16)
    with torch.no_grad():
        assert head.logits(torch.randn(2, 32)).shape == (2, 64)


@pytest.mark.parametrize("what", ["no head", "scaled logits"])
def test_a_head_that_cannot_be_told_is_refused(what: str) -> None:
    if what == "no head":
        model, message = tiny("llama").model, "LlamaModel: no LM head"
    else:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(
            "granite", vocab_size=64, hidden_size=32, num_hidden_layers=2, intermediate_size=64,
            num_attention_heads=2, num_key_value_heads=1, logits_scaling=8.0,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config).eval()
        message = "GraniteForCausalLM: GraniteRMSNorm, Linear do not give its logits"
    with pytest.raises(DecoderError, match=message):
        FinalHead(model, [5, 6, 7])
