# SPDX-License-Identifier: Apache-2.0
"""The table and the pictures of docs/evidence.md, from a made-up run."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
from evaluation.synthetic import DENSE, PLAIN, SETTINGS, answer, realistic, write

from vllm_adaskip.lab.evaluation.results import Question

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
evidence = import_module("evidence")


def test_each_setting_has_a_line_and_dense_no_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, [*realistic(["sum", "key"], 12)])
    evidence.table(tmp_path)
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
    evidence.draw(tmp_path, "skip 5", named)
    evidence.draw(tmp_path, "skip 6", other)
    assert named.read_bytes() != other.read_bytes()


def test_pictures_of_a_sweep_and_of_an_oracle(tmp_path: Path) -> None:
    write(tmp_path, [*realistic(["sum", "key"], 12)])
    evidence.sweep(tmp_path, tmp_path / "sweep.png")
    evidence.oracle(tmp_path, None, tmp_path / "oracle.png")
    assert (tmp_path / "sweep.png").read_bytes() != (tmp_path / "oracle.png").read_bytes()


def test_own_answers_become_references_and_those_cut_off_may_be_left_out(tmp_path: Path) -> None:
    texts = {"sum/0": ("7 .", 3), "sum/1": ("and so on and", 8), "sum/2": ("", 1)}
    asked = [Question(item=item, prompt=f"{item} ?", references=["1"]) for item in texts]
    said = [
        answer(setting, item, 1.0, text=text if setting == "dense" else "no", tokens=tokens)
        for item, (text, tokens) in texts.items()
        for setting in ("dense", "skip 5")
    ]
    write(tmp_path, [*asked, *said], [DENSE, PLAIN])
    for ended, kept in ((False, ["7 .", "and so on and"]), (True, ["7 ."])):
        evidence.own(tmp_path, out := tmp_path / "own.jsonl", ended)
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        assert [line["reference"] for line in lines] == kept
        assert lines[0] == {"task": "sum", "prompt": "sum/0 ?", "reference": "7 ."}
