# SPDX-License-Identifier: Apache-2.0
"""The table and the pictures of docs/evidence.md, from a made-up run."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest
from evaluation.synthetic import DENSE, PLAIN, SETTINGS, answer, realistic, write

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
evidence = import_module("evidence")


def test_each_setting_has_a_line_and_dense_no_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, [*realistic(["sum", "key"], 12)])
    evidence.main(tmp_path, "", tmp_path / "none.png")
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split(" | ")[0][2:] for line in lines] == [one.name for one in SETTINGS]
    dense, uniform = (line.split(" | ") for line in lines[:2])
    assert dense[1] == "0.0%" and dense[3] == ""
    assert uniform[1] == "16.7%" and " to " in uniform[3]


def test_a_picture_shows_what_was_named(tmp_path: Path) -> None:
    dense = [answer("dense", f"sum/{number}", 1.0) for number in range(10)]
    without = [answer("skip 5", one.item, 0.0, [5]) for one in dense]
    write(tmp_path, [*dense, *without], [DENSE, PLAIN])
    named, other = tmp_path / "named.png", tmp_path / "other.png"
    evidence.main(tmp_path, "skip 5", named)
    evidence.main(tmp_path, "skip 6", other)
    assert named.read_bytes() != other.read_bytes()
