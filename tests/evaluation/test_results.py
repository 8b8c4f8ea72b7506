# SPDX-License-Identifier: Apache-2.0
"""The results folder: there and back, a killed run, another run in the same place."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from vllm_adaskip import bundled_model, bundled_profile
from vllm_adaskip.lab import digest
from vllm_adaskip.lab.data.items import Item
from vllm_adaskip.lab.evaluation.manifest import asking, new_manifest, start_or_resume
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


# --- what decides a number ---

ITEM = Item("sum/1", "sum", "1 + 1 =", ("2",), "exact_match")


def asked(*items: Item, settings: Sequence[Setting] = (DENSE,), **told: Any) -> Any:
    told = {"metric": "exact_match", "max_tokens": 8} | told
    return asking(manifest(**told.pop("manifest", {})), settings, items or [ITEM], **told)


def test_the_same_run_goes_on_and_a_round_of_it_stays_the_same(tmp_path: Path) -> None:
    results = Results(tmp_path)
    assert start_or_resume(results, asked()).inputs == start_or_resume(results, asked()).inputs


@pytest.mark.parametrize(
    "other",
    [
        Item("sum/1", "sum", "1 + 2 =", ("2",), "exact_match"),
        Item("sum/1", "sum", "1 + 1 =", ("3",), "exact_match"),
        Item("sum/1", "sum", "1 + 1 =", ("2", "two"), "exact_match"),
        Item("sum/2", "sum", "1 + 1 =", ("2",), "exact_match"),
        Item("sum/1", "add", "1 + 1 =", ("2",), "exact_match"),
    ],
)
def test_other_questions_under_the_same_name_are_refused(tmp_path: Path, other: Item) -> None:
    results = Results(tmp_path)
    old = start_or_resume(results, asked()).inputs["questions"]
    with pytest.raises(ResultsError, match=f"its questions is '{old}', not '"):
        start_or_resume(results, asked(other))


@pytest.mark.parametrize(("key", "value"), [("max_tokens", 9), ("metric", "rouge_l")])
def test_other_options_are_refused_with_both_values(tmp_path: Path, key: str, value: Any) -> None:
    results = Results(tmp_path)
    start_or_resume(results, asked())
    with pytest.raises(ResultsError, match=f"its {key} is .*, not {value!r}"):
        start_or_resume(results, asked(**{key: value}))


def test_all_differences_are_named_at_once(tmp_path: Path) -> None:
    results = Results(tmp_path)
    start_or_resume(results, asked())
    with pytest.raises(ResultsError) as raised:
        start_or_resume(results, asked(max_tokens=9, manifest={"seed": 1}))
    assert "its seed is 0, not 1" in str(raised.value)
    assert "its max_tokens is 8, not 9" in str(raised.value)


@pytest.mark.parametrize(
    ("field", "change", "words"),
    [
        pytest.param(
            "versions",
            {"vllm": "0.1"},
            "its vllm version is '0.1'",
            marks=pytest.mark.engine,  # another one is installed
        ),
        ("versions", {"vllm-adaskip": "0.0.1"}, "its vllm-adaskip version is '0.0.1'"),
        ("hardware", {"processor": "an abacus"}, "its processor is 'an abacus'"),
    ],
)
def test_other_packages_and_machines_are_refused(
    tmp_path: Path, field: str, change: dict[str, str], words: str
) -> None:
    results = Results(tmp_path)
    now = asked()
    results.write_manifest(now.model_copy(update={field: getattr(now, field) | change}))
    with pytest.raises(ResultsError, match=words):
        start_or_resume(results, now)


def test_a_run_that_did_not_record_its_questions_is_refused(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.write_manifest(asked().model_copy(update={"inputs": {}}))
    with pytest.raises(ResultsError, match="its questions is 'not recorded', not '"):
        start_or_resume(results, asked())


def a_model(folder: Path) -> Path:
    return Path(shutil.copytree(bundled_model(), folder))


def weights(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1000] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def tokenizer(folder: Path) -> None:
    text = (folder / "tokenizer_config.json").read_text()
    (folder / "tokenizer_config.json").write_text(text + "\n")


def template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")


@pytest.mark.parametrize("change", [weights, tokenizer, template])
def test_another_model_of_the_same_shape_is_refused(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    model = a_model(tmp_path / "model")
    results = Results(tmp_path / "run")
    start_or_resume(results, asked(manifest={"model": str(model)}))
    change(model)
    with pytest.raises(ResultsError, match="its model files is '"):
        start_or_resume(results, asked(manifest={"model": str(model)}))


def test_a_copy_of_the_model_goes_on_and_is_the_one_that_runs(tmp_path: Path) -> None:
    results = Results(tmp_path / "run")
    start_or_resume(results, asked())
    copy = str(a_model(tmp_path / "model"))
    assert start_or_resume(results, asked(manifest={"model": copy})).model == copy


def test_a_large_file_is_told_by_size_and_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest, "WHOLE", 1 << 20)
    path = tmp_path / "weights"
    path.write_bytes(content := bytes(range(256)) * (1 << 15))
    before = digest.of_file(path)
    assert digest.of_file(path) == before
    for changed in (content + b"0", b"1" + content[1:], content[:-1] + b"1"):
        path.write_bytes(changed)
        assert digest.of_file(path) != before


def test_another_content_of_a_profile_is_refused(tmp_path: Path) -> None:
    profile = Path(shutil.copytree(bundled_profile("first"), tmp_path / "mine"))
    setting = Setting(name="p", family="p", method="first", options={"profile": str(profile)})
    results = Results(tmp_path / "run")
    start_or_resume(results, asked(settings=[DENSE, setting]))
    text = (profile / "adaskip.json").read_text()
    (profile / "adaskip.json").write_text(text.replace("0.", "0.0", 1))
    with pytest.raises(ResultsError, match=f"its profile {profile} is"):
        start_or_resume(results, asked(settings=[DENSE, setting]))


def test_a_sweep_needs_no_metric_but_the_same_questions(tmp_path: Path) -> None:
    results = Results(tmp_path)
    start_or_resume(results, asked())
    start_or_resume(results, asking(manifest(engine={}), [], [ITEM], end=True))
    with pytest.raises(ResultsError, match="its end is True, not False"):
        start_or_resume(results, asking(manifest(engine={}), [], [ITEM], end=False))
