# SPDX-License-Identifier: Apache-2.0
"""``adaskip fit draft`` as users start it."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest
from helpers.readme import ENVIRONMENT
from typer.testing import CliRunner

from vllm_adaskip import bundled_model
from vllm_adaskip.cli.main import app
from vllm_adaskip.engine.draft_weights import DraftProfile, read_weights


def run(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", f"adaskip fit draft {command}"],
        env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip


def test_a_draft_is_trained_on_own_answers_and_kept(tmp_path: Path) -> None:
    command = f"--out {tmp_path} --limit 8 --minutes 0.05 --batch 8 --vocabulary 99 --tokens 12"
    done = run(command)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "share of the model's tokens that 2 layers have right" in " ".join(done.stdout.split())
    assert f"--additional-config.adaskip.draft.profile {tmp_path}" in done.stdout
    made = DraftProfile.load(tmp_path)
    made.check_model(json.loads((Path(bundled_model()) / "config.json").read_text()))
    read = read_weights(tmp_path, made.exit, 192)
    assert made.exit == 2 and read.layers and read.vocabulary is not None
    assert len(read.vocabulary) == 99 and read.hears is not None
    before = (tmp_path / "draft.json").stat().st_mtime_ns
    again = run(command)
    assert again.returncode == 0 and (tmp_path / "draft.json").stat().st_mtime_ns == before
    other = run(command.replace("99", "98"))
    assert (
        other.returncode == 2 and "holds another fit: its vocabulary is 99, not 98" in other.stderr
    )


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("--exit 12", "--exit 12; allowed: 1 to 11"),
        ("--answers mine", "--answers 'mine'; allowed: own, given"),
        ("--minutes 0", "0.01"),
        ("--data bundled --apply-chat-template", "--apply-chat-template is of files"),
        ("--limit 1", "examples; allowed: 32 or more"),
    ],
)
def test_wrong_arguments_are_named(tmp_path: Path, command: str, words: str) -> None:
    told = ["fit", "draft", "--out", str(tmp_path / "out"), *shlex.split(command)]
    done = CliRunner().invoke(app, told)
    assert done.exit_code == 2
    assert words in " ".join(done.stderr.replace("│", " ").split())
