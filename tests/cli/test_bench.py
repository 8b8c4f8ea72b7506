# SPDX-License-Identifier: Apache-2.0
"""``adaskip bench`` as users start it; its tables are made in continuous integration."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from helpers.readme import ENVIRONMENT


def run(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", f"adaskip bench {command}"], env=ENVIRONMENT, capture_output=True, text=True
    )


def test_planning_a_step_grows_no_faster_than_what_it_is_for() -> None:
    """Each power is below that of the square, far enough for a busy machine."""
    done = run("curves")
    rows = [line.split() for line in done.stdout.splitlines() if " ms" in line]
    assert {row[0] for row in rows} == {"layers", "sequences", "distinct"}
    assert all(float(row[-1]) < 1.5 for row in rows)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("--model gpt-9", "'gpt-9' is no model to time; allowed: bundled, smollm2, smollm2-135m"),
        ("--model /nowhere", "'/nowhere' is no model to time"),
        ("--batch 1000", "less than or equal to 128"),
        ("--rounds 1", "greater than or equal to 2"),
        ("drafts --draft '{}'", "needs one of 'exit', 'skip' and 'profile'"),
        ("drafts --draft '[4]'", "--draft '[4]'; allowed: a JSON dict"),
        ("drafts --columns a,b", "go with --data"),
    ],
)
def test_what_cannot_be_timed_is_named(command: str, words: str) -> None:
    done = run(command)
    assert done.returncode == 2
    assert words in " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.slow  # four engines are compiled
def test_drafts_are_timed_beside_stock(tmp_path: Path) -> None:
    command = "drafts --data bundled:key --rounds 2 --batch 2 --limit 4 --tokens 12 --dtype float32"
    done = run(f'{command} --draft \'{{"exit": 6, "tokens": 2}}\' --out {tmp_path}')
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "drafts.json").read_text())
    names = [
        "stock vLLM",
        "stock vLLM once more",
        "stock vLLM, eager",
        'drafts {"exit": 6, "tokens": 2}',
    ]
    assert [one["variant"] for one in found] == [*names, "stock vLLM, n-gram drafts"]
    assert all(one["equal"] == [6, 6] and one["per_step"] >= 1 for one in found)
