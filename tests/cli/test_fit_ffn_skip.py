# SPDX-License-Identifier: Apache-2.0
"""``adaskip fit ffn-skip`` from outside: a profile that loads, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from vllm_adaskip.classifiers.profile import Profile
from vllm_adaskip.cli.main import app
from vllm_adaskip.config import AdaSkipConfig

FEW = ["--data", "bundled:topic,sum", "--limit", "20", "--batch", "8"]


def fit(out: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["fit", "ffn-skip", "--out", str(out), *arguments])


@pytest.mark.parametrize("scope", ["sequence", "token"])
def test_it_writes_a_profile_that_a_server_takes(tmp_path: Path, model: str, scope: str) -> None:
    arguments = ["--model", model, *FEW, "--scope", scope, "--warm-up", "0", "--device", "cpu"]
    done = fit(out := tmp_path / "profile", *arguments)
    assert done.exit_code == 0, done.output
    names = {path.name for path in out.iterdir()}
    assert names == {"adaskip.json", "fit.json", "similarity.png"}
    profile = Profile.load(out)
    assert profile.method == "ffn-skip" and 0.2 < float(profile.metrics["skipped"]) < 0.3
    served = AdaSkipConfig.parse({"profile": str(out), "target_skip": 0.1})
    served.check_model(json.loads((Path(model) / "config.json").read_text()))
    assert served.method_options.get("scope", "sequence") == scope
    for words in ("always runs", "MLPs left out", "vllm serve", "adaskip eval"):
        assert words in done.output
    before = (out / "adaskip.json").stat()
    assert fit(out, *arguments).exit_code == 0
    assert (out / "adaskip.json").stat() == before  # nothing was fitted again
    refused = fit(out, *arguments, "--target-skip", "0.3")
    assert refused.exit_code == 2 and "target_skip is 0.25, not 0.3" in refused.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--scope", "layer"], ["--scope 'layer'", "sequence"]),
        (["--target-skip", "1"], ["--target-skip 1", "less than 1"]),
        (["--target-skip", "nan"], ["--target-skip nan"]),
        (["--max-skip", "-1"], ["--max-skip -1"]),
        (["--keep-first", "-2"], ["--keep-first -2"]),
        (["--warm-up", "-1"], ["--warm-up -1"]),
        (["--keep-first", "7", "--keep-last", "5"], ["keep 12 layers; allowed: 0 to 11"]),
    ],
)
def test_what_cannot_be_fitted_is_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: list[str]
) -> None:
    monkeypatch.setattr("vllm_adaskip.cli.fit.loaded", lambda *_: pytest.fail("it was loaded"))
    refused = fit(tmp_path / "out", *arguments)
    assert refused.exit_code == 2
    for word in words:
        assert word in refused.output.replace("\n", " ")
    assert not (tmp_path / "out").exists()
