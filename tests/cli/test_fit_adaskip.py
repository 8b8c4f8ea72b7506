# SPDX-License-Identifier: Apache-2.0
"""``adaskip fit adaskip`` from outside: a profile that loads, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from vllm_adaskip import SkipPlan
from vllm_adaskip.classifiers.profile import Profile
from vllm_adaskip.cli.main import app
from vllm_adaskip.config import AdaSkipConfig

FEW = ["--data", "bundled:topic,sum", "--limit", "20", "--batch", "8"]


def fit(out: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["fit", "adaskip", "--out", str(out), *arguments])


def test_it_writes_a_profile_that_a_server_takes(tmp_path: Path, model: str) -> None:
    arguments = ["--model", model, *FEW, "--target-skip", "0.3", "--device", "cpu"]
    done = fit(out := tmp_path / "profile", *arguments)
    assert done.exit_code == 0, done.output
    assert {path.name for path in out.iterdir()} == {"adaskip.json", "fit.json", "similarity.png"}
    profile = Profile.load(out)
    assert (profile.method, profile.max_compute, profile.options) == ("adaskip", 0.7, {})
    assert AdaSkipConfig.parse({"profile": str(out)}).max_compute == 0.7
    for words in ("left out", "vllm serve", "adaskip eval"):
        assert words in done.output
    # Of four layers the ends are kept, and 30 % of the compute is more than one MLP.
    shares = [line.split() for line in done.output.splitlines() if line.strip()[:1].isdigit()][-4:]
    assert [row[2] for row in (shares[0], shares[3])] == ["0%", "0%"]
    assert sum(float(row[4].rstrip("%")) for row in shares) > 100


def test_it_writes_one_set_for_prompts(tmp_path: Path, model: str) -> None:
    arguments = ["--model", model, *FEW, "--target-skip", "0.3", "--device", "cpu", "--prompts"]
    done = fit(out := tmp_path / "profile", *arguments)
    assert done.exit_code == 0, done.output
    profile = Profile.load(out)
    assert (profile.method, profile.max_compute, profile.options) == ("none", 1.0, {})
    served = AdaSkipConfig.parse({"profile": str(out)}).prompt
    assert served is not None and served.skip == profile.prompt["skip"]
    plan = SkipPlan.parse(profile.prompt["skip"], 4)
    assert not (plan.attention | plan.mlp) & 0b1001  # the ends are kept
    assert plan.mlp.bit_count() == 2 and 0.5 < float(profile.metrics["compute_kept"]) <= 0.7


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target-skip", "1"], "--target-skip 1; allowed: between 0 and 1"),
        (["--keep-first", "-1"], "--keep-first -1"),
        (["--keep-first", "6", "--keep-last", "6"], "keep 12 layers; allowed: 1 to 11"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.setattr("vllm_adaskip.cli.fit.loaded", lambda *_: pytest.fail("it was loaded"))
    refused = fit(tmp_path / "out", *arguments)
    assert refused.exit_code == 2 and words in refused.output.replace("\n", " ")
    assert not (tmp_path / "out").exists()
