# SPDX-License-Identifier: Apache-2.0
"""``adaskip fit heal`` as users start it."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
from helpers.readme import ENVIRONMENT
from typer.testing import CliRunner

from vllm_adaskip.classifiers.lora import Lora
from vllm_adaskip.classifiers.profile import Profile
from vllm_adaskip.cli.main import app

TOLD = "--limit 8 --tokens 8 --steps 3 --batch 4 --rank 2"


def adaskip(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", f"adaskip {command}"], env=ENVIRONMENT, capture_output=True, text=True
    )


def test_a_ladder_is_healed_and_kept(tmp_path: Path) -> None:
    out = tmp_path / "healed"
    command = f"fit heal --out {out} --skip '[5, 6]' --skip '[5]' --prompt-exit 9 {TOLD}"
    done = adaskip(command)
    assert done.returncode == 0, done.stderr[-2000:]
    said = " ".join(done.stdout.split())
    assert all(words in said for words in ("skip 5-6;", "skip 5;", "prompts", "16 tokens"))
    assert "nothing left out 0.0000" in said
    assert "healing: 3 of 3" in done.stderr
    made = Profile.load(out)
    assert (made.method, made.options) == ("static", {"skip": [5, 6], "ladder": [[5]]})
    assert made.prompt == {"exit": 9, "tail": 16} and made.max_compute == pytest.approx(10 / 12)
    assert made.adapter == "planned"
    assert Lora.of(out) is not None and (out / "curve.png").exists()
    assert not (out / "heal.checkpoint").exists()
    before = (out / "adaskip.json").stat().st_mtime_ns
    assert adaskip(command).returncode == 0
    assert (out / "adaskip.json").stat().st_mtime_ns == before
    other = adaskip(command.replace("--rank 2", "--rank 3"))
    assert other.returncode == 2 and "holds another fit: its rank is 2, not 3" in other.stderr
    again = adaskip(f"fit heal --out {tmp_path / 'again'} --profile {out}")
    assert again.returncode == 2 and "has an adapter; allowed" in " ".join(again.stderr.split())


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("", "what shall be healed? allowed: one of --skip, --profile and --early-exit"),
        ("--skip '[5]' --early-exit 3", "allowed: one of --skip"),
        ("--skip '{}'", "--skip '{}'; allowed: a JSON list"),
        ("--skip '[]'", "nothing is left out"),
        ("--skip '[12]'", "12"),
        ("--prompt-exit 12", "nothing is left out"),
        ("--early-exit 0", "allowed: 1 to 12"),
        ("--skip '[5]' --answers mine", "--answers 'mine'; allowed: own, given"),
        ("--skip '[5]' --rank 0", "--rank 0: Input should be greater than or equal to 1"),
        ("--skip '[5]' --lr=-1", "--lr -1.0"),
        ("--skip '[5]' --adapter all", "--adapter 'all': Input should be 'planned' or 'merged'"),
        ("--early-exit 3 --adapter planned", "not with --early-exit; allowed: merged"),
        ("--profile /nowhere", "/nowhere"),
    ],
)
def test_wrong_arguments_are_named(tmp_path: Path, command: str, words: str) -> None:
    told = ["fit", "heal", "--out", str(tmp_path / "out"), *shlex.split(command)]
    done = CliRunner().invoke(app, told)
    assert done.exit_code == 2
    assert words in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()
