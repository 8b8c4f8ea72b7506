# SPDX-License-Identifier: Apache-2.0
"""The results folder: there and back, a killed run, another run in the same place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vllm_adaskip import bundled_model
from vllm_adaskip.lab.evaluation.manifest import new_manifest, start_or_resume
from vllm_adaskip.lab.evaluation.results import Answer, Results, ResultsError, Setting, Timing
from vllm_adaskip.lab.evaluation.settings import DENSE

ANSWER = Answer(
    setting="dense", item="sum/1", task="sum", metric="exact_match", score=1.0, kept=1.0,
    skip=[5, "attn:6"], tokens=3, text="9 \n7 \u2028 ü",
)  # fmt: skip
EAGER = {"enforce_eager": True}
TIMING = Timing(setting="a", round=0, batch=4, tokens=8, seconds=0.5, dense_seconds=1.0)


def manifest(**changes: Any) -> Any:
    facts = {"command": "c", "model": bundled_model(), "data": {"source": "bundled"}, "seed": 0}
    return new_manifest(**{**facts, "engine": EAGER, "settings": [DENSE], **changes})


def test_there_and_back(tmp_path: Path) -> None:
    results = Results(tmp_path / "run")
    start_or_resume(results, manifest())
    results.append([ANSWER, TIMING, ANSWER])
    assert results.read(Answer) == [ANSWER, ANSWER] and results.read(Timing) == [TIMING]
    assert results.manifest() == manifest(**{}).model_copy(
        update={"created": results.manifest().created}
    )
    assert results.manifest().num_layers == 12


def test_half_a_line_of_a_killed_run_is_passed_over_and_written_over(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.append([ANSWER, ANSWER])
    path = tmp_path / "answers.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    assert results.read(Answer) == [ANSWER]
    results.append([ANSWER])
    assert results.read(Answer) == [ANSWER, ANSWER]


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.append([ANSWER])
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write('{"setting": 3}\n')
    with pytest.raises(ResultsError, match=r"answers\.jsonl:2: setting"):
        results.read(Answer)


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match=r"manifest\.json: No such file"):
        Results(tmp_path).manifest()


def test_settings_may_be_added_but_not_changed(tmp_path: Path) -> None:
    results = Results(tmp_path)
    start_or_resume(results, manifest())
    more = Setting(name="more", family="plan", skip=[5])
    assert start_or_resume(results, manifest(settings=[DENSE, more])).settings == [DENSE, more]
    assert start_or_resume(results, manifest()).settings == [DENSE, more]
    other = more.model_copy(update={"skip": [6]})
    with pytest.raises(ResultsError, match="another setting named 'more'"):
        start_or_resume(results, manifest(settings=[DENSE, other]))


def test_a_sweep_without_vllm_shares_the_folder(tmp_path: Path) -> None:
    for engine in ({}, EAGER, {}):
        found = start_or_resume(Results(tmp_path), manifest(engine=engine))
    assert found.engine == EAGER


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"data": {"source": "quiz.jsonl"}}, {"engine": {"enforce_eager": False}}],
)
def test_another_run_in_the_same_folder_is_refused(tmp_path: Path, change: Any) -> None:
    results = Results(tmp_path)
    start_or_resume(results, manifest())
    with pytest.raises(ResultsError, match=f"another run: its {next(iter(change))}"):
        start_or_resume(results, manifest(**change))
