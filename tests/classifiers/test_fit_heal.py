# SPDX-License-Identifier: Apache-2.0
"""Healing: what is taught, what a server merges, and that a stopped training goes on."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fit_models import own_answers, tiny
from helpers.reference import Reference

from vllm_adaskip.classifiers.lora import Lora
from vllm_adaskip.classifiers.plan import SkipPlan
from vllm_adaskip.engine.prompt_plan import PromptPlan, exit_plan
from vllm_adaskip.lab.fitting import training
from vllm_adaskip.lab.fitting.heal import CHECKPOINT, Healed, HealSettings, Rung, _in_turn, heal
from vllm_adaskip.lab.fitting.samples import Sample, answer_logits, batch_of
from vllm_adaskip.lab.fitting.sub_layers import leaving_out, visited

LAYERS = 4
SMALL = HealSettings(steps=60, batch=8, lr=0.01, rank=4)
MERGED = SMALL.model_copy(update={"adapter": "merged"})
MIDDLE, LESS = Rung(SkipPlan.parse([1, 2], LAYERS)), Rung(SkipPlan.parse([1], LAYERS))
READING = Rung(SkipPlan(LAYERS), PromptPlan(exit_plan(2, LAYERS), tail=1))
BOTH = Rung(MIDDLE.plan, READING.prompt)


def told_nothing(what: str, steps: int) -> None:
    pass


def healed(
    folder: Path,
    *rungs: Rung,
    report: Callable[[str, int], None] = told_nothing,
    settings: HealSettings = SMALL,
) -> Healed:
    folder.mkdir(exist_ok=True)
    model = tiny("llama", LAYERS)
    return heal(model, known_answers(model), rungs, settings, folder, report)


def known_answers(model: Any) -> list[Sample]:
    """Return a few answers again and again, as a random model learns nothing from one for others.

    So those held back are among those that train.
    """
    return own_answers(model, 20) * 3


@pytest.mark.parametrize("rung", [MIDDLE, READING], ids=["answers", "prompts"])
@pytest.mark.parametrize("settings", [SMALL, MERGED], ids=["planned", "merged"])
def test_what_was_lost_is_learned_and_the_whole_model_stays_near(
    tmp_path: Path, rung: Rung, settings: HealSettings
) -> None:
    done = healed(tmp_path, rung, settings=settings)
    (before, whole), (after, still) = done.before, done.after
    assert (whole.divergence, whole.agreement) == (pytest.approx(0, abs=1e-6), 1)
    assert after.divergence < 0.7 * before.divergence and after.agreement >= before.agreement
    assert still.divergence < 0.7 * before.divergence
    assert settings is MERGED or still == whole
    assert not done.worse
    assert set(done.curve) == {"divergence", "tokens that changed"}


@pytest.mark.parametrize("family", ["mistral", "opt", "qwen2", "qwen3"])
def test_models_of_other_families_learn_too(tmp_path: Path, family: str) -> None:
    model = tiny(family, LAYERS)
    settings = SMALL.model_copy(update={"steps": 30})
    done = heal(model, known_answers(model), [MIDDLE], settings, tmp_path, told_nothing)
    assert done.after[0].divergence < 0.9 * done.before[0].divergence


@pytest.mark.parametrize("rung", [MIDDLE, READING], ids=["answers", "prompts"])
def test_the_adapter_is_what_a_server_merges(tmp_path: Path, rung: Rung) -> None:
    done = healed(tmp_path, rung, settings=MERGED)
    lora = Lora.of(tmp_path)
    assert lora is not None
    served, whole = tiny("llama", LAYERS), tiny("llama", LAYERS)
    samples = known_answers(whole)[:6]  # those held back
    served.load_state_dict(dict(lora.merged(served.state_dict().items())))
    batch = batch_of(samples, torch.device("cpu"))
    with torch.no_grad():
        wanted = answer_logits(whole, batch).argmax(-1)
        with visited(served, leaving_out(batch, [rung.plan] * 6, [rung.prompt] * 6)):
            found = answer_logits(served, batch).argmax(-1)
    answers = batch.labels[:, -wanted.shape[1] :] != -100
    agreement = (found == wanted)[answers].float().mean().item()
    assert agreement == pytest.approx(done.after[0].agreement, abs=0.05)


def test_a_prompt_plan_spares_the_last_tokens_and_the_answer() -> None:
    """Layers behind the exit see the stream as it was there, from all but these."""
    model = tiny("llama", LAYERS)
    samples = own_answers(model, 4)
    batch = batch_of(samples, torch.device("cpu"))
    seen: dict[int, torch.Tensor] = {}
    visit = leaving_out(batch, [SkipPlan(LAYERS)] * 4, [READING.prompt, None] * 2)

    def look(sub_layer: int, before: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        seen[sub_layer] = (made := visit(sub_layer, before, update))
        return made

    with visited(model, look), torch.no_grad():
        model(batch.ids, attention_mask=batch.real.long(), position_ids=batch.positions)
    for row, sample in enumerate(samples):
        prompt, own = len(sample.ids) - sample.answer, batch.real[row]
        updates = seen[6][row, own].abs().sum(-1)
        passed = prompt - 1 if row % 2 == 0 else 0
        assert (updates[:passed] == 0).all() and (updates[passed:] > 0).all()
        assert (seen[3][row, own].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("rung", [MIDDLE, READING, BOTH], ids=["answers", "prompts", "both"])
def test_what_is_judged_is_what_a_reference_does(tmp_path: Path, rung: Rung) -> None:
    """Tokens that leave something out run the merged checkpoint, all others the model."""
    done = healed(tmp_path, rung)
    lora = Lora.of(tmp_path)
    assert lora is not None
    plain, taught = tiny("llama", LAYERS), tiny("llama", LAYERS)
    samples = known_answers(plain)[:6]  # those held back
    plain.save_pretrained(tmp_path / "plain")
    taught.load_state_dict(dict(lora.merged(taught.state_dict().items())))
    taught.save_pretrained(tmp_path / "taught")
    reference = Reference(str(tmp_path / "plain"), taught=str(tmp_path / "taught"))
    same = tokens = 0
    for one in samples:
        prompt, answer = one.ids[: -one.answer], one.ids[-one.answer :]
        read = {"prompt_plan": ([2, 3], 1)} if rung.prompt else {}
        found = reference.logprobs(prompt, rung.plan.entries(), answer, **read).argmax(-1)
        whole = reference.logprobs(prompt, [], answer).argmax(-1)
        same, tokens = same + int((found == whole).sum()), tokens + len(answer)
    assert done.after[0].agreement == pytest.approx(same / tokens, abs=1.5 / tokens)


def test_rows_follow_each_rung_as_often_and_a_share_nothing() -> None:
    batches = (
        batch_of(part, torch.device("cpu")) for part in _parts(own_answers(tiny("llama"), 48))
    )
    drawn = [
        *itertools.chain.from_iterable(
            _in_turn(batch, [MIDDLE, LESS], READING, 0.25) for batch in batches
        )
    ]
    assert [drawn.count(each) for each in (MIDDLE, LESS, READING)] == [18, 18, 12]


def _parts(samples: list[Any]) -> list[list[Any]]:
    return [samples[at : at + 8] for at in range(0, len(samples), 8)]


@pytest.mark.parametrize("rung", [MIDDLE, READING], ids=["answers", "prompts"])
def test_a_batch_that_is_too_large_is_trained_in_parts_to_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rung: Rung
) -> None:
    settings = SMALL.model_copy(update={"steps": 5})
    at_once = healed(tmp_path / "at once", rung, settings=settings)
    monkeypatch.setattr(training, "_PAIRS", 3 * 8**2)
    parts = training.in_parts(known_answers(tiny("llama", LAYERS))[:8])
    assert sum(map(len, parts)) == 8 and max(map(len, parts)) < 8
    in_parts = healed(tmp_path / "in parts", rung, settings=settings)
    for name, values in at_once.curve.items():
        assert in_parts.curve[name] == pytest.approx(values, rel=0.02, abs=0.01)


def test_no_sample_is_too_long_for_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_PAIRS", 10)
    samples = own_answers(tiny("llama", LAYERS), 3)
    assert [len(part) for part in training.in_parts(samples)] == [1, 1, 1]


def test_a_stopped_training_goes_on_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "EVERY", 4)
    settings = SMALL.model_copy(update={"steps": 10})
    first = healed(tmp_path / "whole", MIDDLE, LESS, settings=settings)
    steps = 0

    def stop(what: str, done: int) -> None:
        nonlocal steps
        if (steps := steps + done) >= 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        healed(tmp_path / "halves", MIDDLE, LESS, settings=settings, report=stop)
    assert (tmp_path / "halves" / CHECKPOINT).exists()
    second = healed(tmp_path / "halves", MIDDLE, LESS, settings=settings)
    assert second == first
    name = "lora/adapter_model.safetensors"
    assert (tmp_path / "halves" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_an_adapter_that_makes_it_worse_is_found_out(tmp_path: Path) -> None:
    done = healed(tmp_path, MIDDLE, settings=SMALL.model_copy(update={"lr": 5.0, "steps": 5}))
    assert done.worse == [MIDDLE]
