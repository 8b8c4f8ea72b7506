# SPDX-License-Identifier: Apache-2.0
"""A whole fit of FiRST, tiny: what is learned, what is written, and that it can be stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.fit_models import own_answers, tiny, useless

from vllm_adaskip.classifiers.first.fit.codebook import plans_of
from vllm_adaskip.classifiers.first.fit.fitted import CHECKPOINTS, fit_first
from vllm_adaskip.classifiers.first.fit.gated import gated_logits
from vllm_adaskip.classifiers.first.fit.lora import no_skipping, train_lora
from vllm_adaskip.classifiers.first.fit.routing import prompt_scores
from vllm_adaskip.classifiers.first.fit.settings import FirstSettings
from vllm_adaskip.classifiers.first.method import FirstOptions
from vllm_adaskip.classifiers.first.routers import FILE, Routers
from vllm_adaskip.classifiers.lora import Lora
from vllm_adaskip.lab.fitting import training
from vllm_adaskip.lab.fitting.samples import batch_of
from vllm_adaskip.lab.fitting.training import adapt

LAYERS = 5
TOLD = {"steps": 40, "batch": 8, "lr": 0.05, "codebook": 2}


def settings(**changes: Any) -> FirstSettings:
    return FirstSettings.model_validate({**TOLD, **changes})


def told_nothing(what: str, steps: int) -> None:
    pass


def a_model() -> Any:
    """Return a model in which layer 2 does nothing and the others do much."""
    model = tiny("llama", LAYERS)
    useless(model, 2)
    return model


def fitted(folder: Path, report: Callable[[str, int], None] = told_nothing, **changes: Any) -> Any:
    folder.mkdir(exist_ok=True)
    model = a_model()
    samples = own_answers(model, 60)
    return fit_first(model, samples, settings(**changes), folder, report), model, samples


def test_a_useless_layer_is_left_out_and_the_others_are_kept(tmp_path: Path) -> None:
    # A share of 0.2 is one layer of five.
    found, model, samples = fitted(tmp_path, penalty=0.2, target_skip=0.2, steps=80)
    assert found.options.codebook[0] == [2]
    routers = Routers.load(tmp_path, LAYERS, 32)
    scores = prompt_scores(model, routers, FirstOptions(), samples, 8)
    plans = plans_of(scores, found.options).mean(0)
    assert plans[2] > 0.85 and plans[[1, 3]].max() < 0.25 and not plans[[0, 4]].any()
    curve = found.curves["routers"]
    assert set(curve) == {"cross-entropy", "penalty", "regulariser"}
    total = np.sum([*curve.values()], axis=0)
    assert total.shape == (80,) and total[-8:].mean() < total[:8].mean() - 0.05
    assert found.metrics["skipped"] == pytest.approx(0.2, abs=0.02)
    assert found.metrics["right_dense"] == 1
    assert sum(task.samples for task in found.tasks) == found.metrics["held_back"] == 12


@pytest.mark.parametrize("reduce", ["fraction", "last"])
def test_other_reductions_and_wider_routers(tmp_path: Path, reduce: str) -> None:
    method = FirstOptions.model_validate({"reduce": reduce, "keep_first": 2, "keep_last": 2})
    found, *_ = fitted(tmp_path, method=method, router_width=3, steps=8, codebook=0)
    assert Routers.load(tmp_path, LAYERS, 32).width == 3
    assert found.options.reduce == reduce and not found.options.codebook
    assert 0 <= found.options.calibration[-1][1] <= 0.2  # one layer may be left out


def stopped(folder: Path, after: int, **changes: Any) -> None:
    """Fit until so many steps were reported, then be killed."""
    steps = 0

    def report(what: str, done: int) -> None:
        nonlocal steps
        steps += done
        if steps >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitted(folder, report, **changes)


@pytest.mark.parametrize("after", [7, 13])
def test_a_stopped_fit_goes_on_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """In either phase: of ten steps of routers, and six of LoRA."""
    monkeypatch.setattr(training, "EVERY", 3)
    told = {"steps": 10, "lora_steps": 6, "lora_rank": 2}
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    first, model, _ = fitted(whole, **told)
    stopped(halves, after, **told)
    assert (halves / CHECKPOINTS[0]).exists()
    assert (halves / CHECKPOINTS[1]).exists() == (after > 10)
    counted: list[int] = []
    second, other, _ = fitted(halves, lambda what, steps: counted.append(steps), **told)
    assert sum(counted) == 16 and max(counted) > 1  # what was done before is reported at once
    assert second == first
    for name in (FILE, "lora/adapter_model.safetensors"):
        assert (halves / name).read_bytes() == (whole / name).read_bytes()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_lora_learns_what_skipping_lost_and_is_what_a_server_merges(tmp_path: Path) -> None:
    """Two layers that matter are left out of every answer."""
    method = FirstOptions(keep_first=1, keep_last=1)
    told: dict[str, Any] = {"steps": 1, "penalty": 9.0, "target_skip": 0.6, "codebook": 0}
    found, adapted, samples = fitted(tmp_path, method=method, lora_steps=60, lora_lr=0.01, **told)
    curve = found.curves["LoRA"]["cross-entropy"]
    assert np.mean(curve[-8:]) < 0.7 * np.mean(curve[:8])
    names = {path.name for path in (tmp_path / "lora").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    lora = Lora.of(tmp_path)
    assert lora is not None
    served = a_model()
    served.load_state_dict(dict(lora.merged(served.state_dict().items())))
    batch = batch_of(samples[:4], torch.device("cpu"))
    with torch.no_grad():
        want, got = (gated_logits(one, batch, no_skipping(batch)) for one in (adapted, served))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_lora_by_itself_without_skipping(tmp_path: Path) -> None:
    model = a_model()
    samples = own_answers(tiny("llama", LAYERS), 24)  # another model's answers
    adapt(model, 4, seed=0)
    curve = train_lora(
        model, samples, no_skipping, steps=20, batch=8, rate=0.01, seed=0,
        checkpoint=tmp_path / "checkpoint", made=lambda steps: None,
    )["cross-entropy"]  # fmt: skip
    assert np.mean(curve[-4:]) < 0.8 * np.mean(curve[:4])


def test_what_a_model_cannot_skip_is_refused() -> None:
    settings(target_skip=0.6).check(5)
    with pytest.raises(ValueError, match=r"target_skip 0\.61; allowed: 0 to 0\.6"):
        settings(target_skip=0.61).check(5)
