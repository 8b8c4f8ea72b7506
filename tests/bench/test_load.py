# SPDX-License-Identifier: Apache-2.0
"""What open-loop load sends, and what it makes of what comes back."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vllm_adaskip.cli.main import app
from vllm_adaskip.lab.bench import load
from vllm_adaskip.lab.bench.load import Asked, Objective, draw, measure

ASKED = Asked("http://here", "m", "/m", Path("prompts.jsonl"), 4, 10.0, Objective(500, 50))
SAID = {
    "request_goodput": 1.5,
    "request_throughput": 1.8,
    "failed": 1,
    "ttfts": [0.1, 0.2, 0.0],
    "itls": [[0.01, 0.03], [0.04], []],  # the last one failed
}


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that are run; a server counts 10 tokens of 3 layers after each."""
    commands = list[list[str]]()

    def run(command: list[str], **_: Any) -> Any:
        commands.append(command)
        Path(command[command.index("--result-filename") + 1]).write_text(json.dumps(SAID))
        return subprocess.CompletedProcess(command, 0, "", "")

    def report(url: str) -> dict[str, Any]:
        turns = len(commands)
        return {
            "num_layers": 3,
            "decode_tokens": 10 * turns,
            "prompt_tokens": 8 * turns,
            "shortened_tokens": 6 * turns,
            "attn_run": [10 * turns, 5 * turns, 10 * turns],
            "mlp_run": [10 * turns, 0, 10 * turns],
            "busy": {"level": 1, "entered": [turns, 2 * turns]},
        }

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(load, "_report", report)
    return commands


def test_variants_take_turns_and_points_say_what_each_gave(
    tmp_path: Path, sent: list[list[str]]
) -> None:
    variants = {"dense": {"adaskip": "off"}, "as served": None}
    turns = list[None]()
    found = measure(ASKED, variants, [1.0, 3.0], tmp_path, lambda: turns.append(None))
    assert len(turns) == 4 and len(sent) == 5  # one warms up
    rates = [command[command.index("--request-rate") + 1] for command in sent]
    assert rates == ["0.8", "1", "1", "3", "3"]
    bodies = ["--extra-body" in command for command in sent[1:]]
    assert bodies == [False, True, True, False]
    assert "ttft:500" in sent[1] and "tpot:50" in sent[1]
    assert sent[3][sent[3].index("--num-prompts") + 1] == "30"
    one = found[0]
    assert (one.variant, one.rate, one.good, one.served, one.failed) == (
        "as served",
        1,
        1.5,
        1.8,
        1,
    )
    assert one.first_token[0] == pytest.approx(150) and one.per_token[0] == pytest.approx(30)
    assert one.ran == pytest.approx(45 / 60) and one.shortened == pytest.approx(6 / 8)
    assert one.levels == [1, 2]
    draw(found, ASKED.objective, tmp_path / "load.png")
    assert (tmp_path / "load.png").stat().st_size > 10_000


def test_what_fails_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> Any:
        return subprocess.CompletedProcess(command, 1, "", "a\nno such model\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ValueError, match="vllm bench serve failed: no such model"):
        measure(ASKED, {"dense": None}, [1.0], tmp_path, lambda: None)


def test_a_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    told = ["bench", "load", "--rate", "1", "--url", "http://127.0.0.1:9", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, told)
    assert done.exit_code == 2
    assert "'http://127.0.0.1:9' does not answer as a vLLM server" in " ".join(done.stderr.split())
