# SPDX-License-Identifier: Apache-2.0
"""``adaskip scan`` refuses what it cannot do in one sentence, before a model is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from vllm_adaskip.cli.main import app
from vllm_adaskip.lab.scan.fits import ModelError, check_memory


def scan(*arguments: str) -> Result:
    env = {"COLUMNS": "160", "HF_HUB_OFFLINE": "1"}
    return CliRunner().invoke(app, ["scan", *arguments], env=env)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--unit", "head"], "--unit 'head'; allowed: sub-layer, layer"),
        (["--agreement", "1"], "--agreement 1; allowed: a number in (0, 1)"),
        (["nobody/nothing"], "model 'nobody/nothing': no such folder, and the hub:"),
        (["../x/y"], "model '../x/y': no such folder, and the hub:"),
        (["--columns", "a,b"], "--columns and --apply-chat-template go with --data"),
        (["--data", "nowhere.csv"], "nowhere.csv"),
    ],
)
def test_what_is_refused(tmp_path: Path, arguments: list[str], words: str) -> None:
    done = scan("--out", str(out := tmp_path / "out"), *arguments)
    assert done.exit_code == 2 and words in done.output, done.output
    assert done.output.count("\n") == 1 and not out.exists()


def test_a_family_that_we_do_not_serve_and_a_model_without_weights(
    tmp_path: Path, model: str
) -> None:
    (other := tmp_path / "other").mkdir()
    config = json.loads((Path(model) / "config.json").read_text())
    shutil.copytree(model, bare := tmp_path / "bare", ignore=shutil.ignore_patterns("*.safe*"))
    config |= {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    (other / "config.json").write_text(json.dumps(config))
    out = ["--out", str(tmp_path / "out")]
    for folder, words in (
        (other, "of the family GPT2LMHeadModel, in which vllm-adaskip cannot skip; supported:"),
        (bare, "no weights; allowed: a model with *.safetensors"),
        (tmp_path, "no model that transformers knows"),
    ):
        done = scan(str(folder), *out)
        assert done.exit_code == 2 and words in done.output, done.output
    assert not (tmp_path / "out").exists()


def test_a_prompt_that_the_model_cannot_run_so_far(tmp_path: Path, model: str) -> None:
    done = scan(model, "--prompt-exit", "99", "--out", str(out := tmp_path / "out"))
    assert done.exit_code == 2 and "99 is not allowed; allowed: 1 to" in done.output
    layers = json.loads((Path(model) / "config.json").read_text())["num_hidden_layers"]
    done = scan(model, "--prompt-exit", str(layers), "--out", str(out))
    assert done.exit_code == 2
    assert f"{layers}: the whole model; allowed: 1 to {layers - 1}" in done.output
    assert not out.exists()


def test_a_model_too_large(model: str) -> None:
    with pytest.raises(ModelError, match=r"a scan needs about 4\.\d GB of memory .* 1.0 GB are"):
        check_memory(model, 10**9)
    check_memory(model, 10**10)


def test_a_file_without_questions(tmp_path: Path, model: str) -> None:
    (empty := tmp_path / "empty.jsonl").write_text("")
    done = scan(model, "--data", str(empty), "--out", str(tmp_path / "out"))
    assert done.exit_code == 2 and "no items" in done.output and not (tmp_path / "out").exists()
