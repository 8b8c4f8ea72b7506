# SPDX-License-Identifier: Apache-2.0
"""Layers that were trained to draft: an engine drafts what they drafted in training.

Fails when a copy's weights land in the model, when its K and V are not read or written as in
training, or when the model's answers change.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_LAYERS
from helpers.batches import greedy, random_prompts
from helpers.reference import Reference
from helpers.tiny import write_llama
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from vllm_adaskip import engine_args
from vllm_adaskip.classifiers.profile import ProfileError
from vllm_adaskip.engine.draft_weights import HEARS, TENSORS, DraftProfile, read_weights
from vllm_adaskip.lab.fitting.draft import Draft, Read, fed, saved
from vllm_adaskip.lab.fitting.samples import Sample

EXIT, TOKENS = 5, 24


def disturbed(
    model: str, folder: Path, vocabulary: torch.Tensor | None = None, *, hears: bool = True
) -> Draft:
    """Write a draft whose layers are not the model's; return it, rounded as it was written.

    ``hears``: else as drafts were written that hear nothing.
    """
    torch.manual_seed(1)
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    draft = Draft(whole, EXIT, vocabulary)
    for weight in draft.trained().values():
        weight.add_((0.01 + 0.3 * weight.std()) * torch.randn_like(weight))
        weight.copy_(weight.bfloat16())
    saved(draft, folder, model, whole.config.to_dict(), {"accepted": 0.5})
    if not hears:
        draft.trained()[HEARS].zero_()
        tensors = load_file(folder / TENSORS)
        del tensors[HEARS]
        save_file(tensors, folder / TENSORS)
    return draft


def wanted(draft: Draft, tokens: list[int], drafted: list[int]) -> list[int]:
    """Return what a draft picks behind tokens, and behind each of what was drafted."""
    fed_before = [*tokens, *drafted[:-1]]
    begin = len(tokens) - 2  # with the token before the last one, of which it hears
    with torch.inference_mode():
        hidden = draft._model[0].model(torch.tensor([fed_before])).last_hidden_state[0]
    states = functional.pad(hidden, (0, 0, 1, 0))[begin:-1]
    one = Read("", fed_before, len(drafted), states=states)
    (read,) = draft.read([Sample("", fed_before, len(drafted))], lambda done: None)
    torch.testing.assert_close(read.states.float(), states, rtol=0.01, atol=0.01)
    with torch.inference_mode():
        logits = draft(*fed([one], torch.device("cpu")))[: len(drafted)]
    picked = torch.stack([each[0, place].argmax() for place, each in enumerate(logits, 1)])
    return (picked if draft.vocabulary is None else draft.vocabulary[picked]).tolist()


@pytest.mark.parametrize(
    ("size", "eager", "hears"), [(None, True, True), (None, True, False), (200, False, True)]
)
def test_an_engine_drafts_what_was_trained(
    engine: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: str,
    size: int | None,
    eager: bool,
    hears: bool,
) -> None:
    folder = tmp_path_factory.mktemp("draft")
    vocabulary = None if size is None else torch.arange(size) * 2 + 1
    draft = disturbed(tiny_llama, folder, vocabulary, hears=hears)
    speculate = {"profile": str(folder), "tokens": 3, "adapt": False}
    llm = engine(tiny_llama, enforce_eager=eager, **engine_args(draft=speculate))
    drafter = llm.apply_model(lambda model: model.drafter)[0]
    source, found = drafter._state.pulled._source, dict[tuple[str, int], list[int]]()
    plain = drafter.propose

    def propose(sampled: Any, ends: Any, slots: Any) -> Any:
        drafted = plain(sampled, ends, slots)
        for name, end, own in zip(source.batch, ends.tolist(), drafted, strict=True):
            found[name, end] = own
        return drafted

    drafter.propose = propose
    prompts = random_prompts(1, 5)
    got = greedy(llm, prompts, [[]] * 5, TOKENS)
    reference = Reference(tiny_llama)
    assert got == [reference.generate(prompt, [], TOKENS)[0] for prompt in prompts]
    whole = {
        name: [*prompts[at], *got[at]]
        for at, name in enumerate(
            sorted({n for n, _ in found}, key=lambda one: int(one.split("-")[0]))
        )
    }
    checked = 0
    for (name, end), own in found.items():
        if own and end < len(whole[name]):
            assert own == wanted(draft, whole[name][:end], own)
            checked += 1
    assert checked > 60


def test_a_draft_of_another_model_is_refused(
    engine: Callable[..., Any], tmp_path: Path, tiny_llama: str
) -> None:
    other = write_llama(tmp_path / "other", layers=TINY_LAYERS, vocab_size=64)
    disturbed(other, tmp_path / "draft")
    speculate = {"profile": str(tmp_path / "draft")}
    with pytest.raises(ValueError, match=r"the draft was made for '.*other'"):
        engine(tiny_llama, **engine_args(draft=speculate))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.5.mlp.up_proj.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.embed_tokens.weight",
        "model.layers.0.../../x",
        "lm_head.weight",
    ],
)
def test_tensors_that_do_not_belong_there_are_refused(
    tmp_path: Path, tiny_llama: str, name: str
) -> None:
    disturbed(tiny_llama, tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    save_file({**tensors, name: torch.ones(2)}, tmp_path / TENSORS)
    with pytest.raises(ProfileError, match="is not allowed; allowed: weights of the first 5"):
        read_weights(tmp_path, EXIT, 128)


@pytest.mark.parametrize("shape", [(64, 128), (128,), (0, 0)])
def test_what_it_hears_by_fits_the_model(
    tmp_path: Path, tiny_llama: str, shape: tuple[int, ...]
) -> None:
    disturbed(tiny_llama, tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    save_file({**tensors, HEARS: torch.ones(shape)}, tmp_path / TENSORS)
    with pytest.raises(ProfileError, match=r"'hears.weight' is .*; allowed: \[128, 128\]"):
        read_weights(tmp_path, EXIT, 128)


def test_values_that_are_no_numbers_are_refused(tmp_path: Path, tiny_llama: str) -> None:
    disturbed(tiny_llama, tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    save_file({**tensors, "model.norm.weight": torch.full((128,), torch.nan)}, tmp_path / TENSORS)
    with pytest.raises(ProfileError, match="not finite"):
        read_weights(tmp_path, EXIT, 128)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "Invalid JSON"),
        ("[]", "the file"),
        ('{"exit": 0, "model": "m", "fingerprint": "f"}', "exit"),
        ('{"exit": 2, "model": "m"}', "fingerprint"),
        ('{"exit": 2, "model": "m", "fingerprint": "f", "code": "x"}', "code"),
    ],
)
def test_a_file_that_is_no_draft_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "draft.json").write_text(text)
    with pytest.raises(ProfileError, match=complaint):
        DraftProfile.load(tmp_path)
    with pytest.raises(ProfileError, match=r"draft\.json"):
        DraftProfile.load(tmp_path / "nowhere")
