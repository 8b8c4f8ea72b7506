# SPDX-License-Identifier: Apache-2.0
"""``adaskip fit first`` from outside: a profile that loads, and what is refused before a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from vllm_adaskip.classifiers.first.method import FirstOptions
from vllm_adaskip.classifiers.first.routers import Routers
from vllm_adaskip.classifiers.profile import Profile, fingerprint
from vllm_adaskip.cli.main import app
from vllm_adaskip.config import AdaSkipConfig

FEW = ["--data", "bundled:topic,sum", "--limit", "30", "--batch", "8", "--codebook", "2"]


def fit(out: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["fit", "first", "--out", str(out), *arguments])


def test_it_writes_a_profile_that_a_server_takes_and_goes_on_where_it_is_done(
    tmp_path: Path, model: str
) -> None:
    arguments = ["--model", model, "--steps", "6", "--lora-steps", "2", *FEW, "--device", "cpu"]
    done = fit(out := tmp_path / "profile", *arguments)
    assert done.exit_code == 0, done.output
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    # Nothing unpickles, and nothing that only the fit needed is left but what it was told.
    assert names - {"lora/README.md"} == {
        "adaskip.json",
        "routers.safetensors",
        "curve.png",
        "fit.json",
        "lora/adapter_config.json",
        "lora/adapter_model.safetensors",
    }
    profile = Profile.load(out)
    assert (profile.method, profile.model) == ("first", model)
    config = json.loads((Path(model) / "config.json").read_text())
    assert profile.fingerprint == fingerprint(config)
    assert profile.metrics["steps"] == 6 and 0 <= profile.metrics["right_routed"] <= 1
    options = FirstOptions.model_validate(profile.options)
    assert len(options.codebook) <= 2 and options.calibration
    Routers.load(out, 4, 32)
    served = AdaSkipConfig.parse({"profile": str(out)})
    served.check_model(config)
    assert (served.method, served.method_options["threshold"]) == ("first", options.threshold)
    for words in ("vllm serve", "adaskip eval", "topic", "sum", str(out)):
        assert words in done.output
    before = (out / "adaskip.json").stat()
    again = fit(out, *arguments)
    assert again.exit_code == 0 and "vllm serve" in again.output
    assert (out / "adaskip.json").stat() == before  # nothing was fitted again
    other = Path(shutil.copytree(model, tmp_path / "other"))
    shutil.move(model, aside := tmp_path / "aside")
    try:  # other weights under the same name are another model
        content = bytearray((other / "model.safetensors").read_bytes())
        content[-1000] ^= 1
        (other / "model.safetensors").write_bytes(content)
        shutil.move(other, model)
        refused = fit(out, *arguments)
        assert refused.exit_code == 2 and "holds another fit: its model files is" in refused.output
    finally:
        shutil.rmtree(model)
        shutil.move(aside, model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--steps", "7"], ["steps is 2, not 7"]),
        (["--reduce", "last"], ["reduce is 'mean', not 'last'"]),
        (["--seed", "1"], ["examples is '"]),
        (["--data", "bundled:topic"], ["data is 'bundled:topic,sum', not 'bundled:topic'"]),
    ],
)
def test_a_folder_with_another_fit_is_refused(
    tmp_path: Path, model: str, change: list[str], words: list[str]
) -> None:
    told: dict[str, Any] = {"--model": model, "--steps": "2", "--codebook": "0"}
    plain = [each for pair in told.items() for each in pair]
    assert fit(tmp_path, *FEW, *plain).exit_code == 0
    refused = fit(tmp_path, *FEW, *plain, *change)
    assert refused.exit_code == 2
    for word in [*words, "another fit", "use another --out"]:
        assert word in refused.output.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--reduce", "median"], ["--reduce 'median'", "mean"]),
        (["--steps", "0"], ["--steps 0", "greater than or equal to 1"]),
        (["--penalty", "-1"], ["--penalty -1", "greater than or equal to 0"]),
        (["--keep-first", "-1"], ["--keep-first -1"]),
        (["--target-skip", "0.9"], ["target_skip 0.9; allowed: 0 to 0.833"]),
        (["--keep-first", "0", "--keep-last", "0"], ["allowed: 1 to 11"]),
        (["--data", "bundled:nope"], ["no task 'nope'"]),
        (["--data", "bundled:sum", "--limit", "5"], ["5 examples; allowed: 32"]),
        (["--data", "wrong.jsonl"], ["wrong.jsonl:2", "no JSON"]),
        (["--data", "long.jsonl"], ["long/7: 602 tokens; the model allows 512"]),
    ],
)
def test_what_cannot_be_fitted_is_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: list[str]
) -> None:
    monkeypatch.setattr("vllm_adaskip.cli.fit.loaded", lambda *_: pytest.fail("it was loaded"))
    monkeypatch.chdir(tmp_path)
    line = json.dumps({"prompt": "sum : 1 + 1 = ? answer :", "reference": "2"})
    Path("wrong.jsonl").write_text(f"{line}\n{{\n")
    long = json.dumps({"prompt": "1 " * 600, "reference": "2"})
    Path("long.jsonl").write_text("\n".join([*[line] * 6, long, *[line] * 40]))
    refused = fit(tmp_path / "out", *arguments)
    assert refused.exit_code == 2
    for word in words:
        assert word in refused.output.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_a_device_that_is_not_there_is_named(tmp_path: Path, model: str) -> None:
    refused = fit(tmp_path, "--model", model, *FEW, "--device", "warp")
    assert refused.exit_code == 2
    assert "--device 'warp'" in refused.output and "allowed: auto, cpu, cuda" in refused.output
