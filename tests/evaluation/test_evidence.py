# SPDX-License-Identifier: Apache-2.0
"""The table and the pictures of docs/evidence.md, from a made-up run."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest
from evaluation.synthetic import SETTINGS, realistic, write

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
    write(tmp_path, [*realistic(["sum"], 12)])
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    evidence.main(tmp_path, "similarity 0.9", one)
    evidence.main(tmp_path, "similarity 0.9,similarity 0.75", two)
    assert one.read_bytes() != two.read_bytes()
