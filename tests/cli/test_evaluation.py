# SPDX-License-Identifier: Apache-2.0
"""The commands that measure, one after the other as a user gives them, on the bundled model."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from vllm_adaskip import bundled_model, bundled_profile
from vllm_adaskip.classifiers.profile import Profile
from vllm_adaskip.cli import run
from vllm_adaskip.cli.main import app
from vllm_adaskip.config import AdaSkipConfig
from vllm_adaskip.lab.data.items import Item
from vllm_adaskip.lab.evaluation.results import Answer, Results, Timing
from vllm_adaskip.lab.evaluation.summary import summarise

DOCS = Path(__file__).parents[2] / "docs"


def adaskip(*arguments: object, status: int = 0) -> str:
    """Run the command in this process; return what it printed."""
    done = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "160"})
    assert done.exit_code == status, done.output
    return done.output


def by_itself(*arguments: object) -> str:
    """Run the command in a process of its own, as a user does."""
    command = [Path(sys.executable).with_name("adaskip"), *map(str, arguments)]
    env = {**os.environ, "COLUMNS": "160"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def adaskip_anyhow(*arguments: object) -> None:
    """Run the command for what it stores; on a busy machine times may speak against it."""
    CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluation")


PROFILE = bundled_profile("first")
SMALL = ["--limit", 4, "--rounds", 2, "--batch", 4, "--enforce-eager", "--max-compute", 0.75]

TUNE = ["--limit", 4, "--rounds", 3, "--batch", 4, "--enforce-eager"]
CUT = [*TUNE, "--plans", "exit", "--max-compute", 0.2, "--max-loss", 0.3]


def test_eval_oracle_and_report(folder: Path) -> None:
    out = folder / "run"
    asked = ["--out", out, *SMALL, "--plans", "uniform", "--profile", PROFILE, "--target-skip", 0.4]
    table = by_itself("eval", *asked)
    names = ["dense", "uniform 9/12", PROFILE, f"{PROFILE} 0.75", f"{PROFILE} -40%"]
    results = Results(out)
    assert [one.name for one in results.manifest().settings] == names
    assert len(results.read(Answer)) == len(names) * 9 * 4
    assert {(one.setting, one.round) for one in results.read(Timing)} >= {
        (name, round_) for name in names[1:] for round_ in range(2)
    }
    assert "uniform 9/12" in table and "75%" in table
    assert results.manifest().engine == {"max_model_len": 512, "enforce_eager": True}
    summary = summarise(results.manifest(), results.read(Answer), [])
    for one, kept in zip(summary.settings[2:], (0.85, 0.75, 0.7), strict=True):
        assert one.score and one.score.mean > 0.9  # the routers know what they do
        assert one.kept <= kept and one.plan is None  # and give some prompts other plans
    adaskip("eval", *asked)  # nothing is left to do
    assert len(results.read(Answer)) == len(names) * 9 * 4
    assert "early exit" in adaskip("oracle", out) or (out / "oracle.jsonl").exists()
    said = adaskip("report", out, "--max-loss", "50%")
    page = (out / "report.html").read_text()
    assert said.splitlines()[0] in page and "--enforce-eager" in page


def test_tune_writes_a_profile_that_a_server_takes(folder: Path) -> None:
    out = folder / "tuned"
    asked = ["--max-loss", 0.9, "--profile", PROFILE, "--max-compute", 0.75]
    results = Results(folder / "tuned-runs")
    adaskip_anyhow("tune", "--out", out, *TUNE, *asked)
    for seconds in (0.3, 0.9):  # this machine may be busy; the choice is what is tested
        times = [
            one.model_copy(update={"seconds": seconds, "dense_seconds": 1.0})
            for one in results.read(Timing)
        ]
        results.replace(Timing, times)
        if seconds == 0.3:
            shutil.rmtree(out, ignore_errors=True)
            said = adaskip("tune", "--out", out, *TUNE, *asked, status=1)
            assert "cannot save more time than that" in said and not out.exists()
    said = adaskip("tune", "--out", out, *TUNE, *asked)
    assert f"adaskip.profile {out}" in said and "--enforce-eager" in said
    found = Profile.load(out)
    assert found.method == "first" and "held_out_loss_bound_95" in found.metrics
    served = AdaSkipConfig.parse({"profile": str(out)})
    assert served.method == "first" and served.guard
    assert (out / "routers.safetensors").exists()


def test_tune_writes_a_prompt_plan_that_a_server_takes(folder: Path) -> None:
    out = folder / "prompts"
    asked = ["--data", "bundled:sum", "--limit", 8, "--max-loss", 0.9, "--prompt-exit", 9]
    command = ["tune", "--out", out, *TUNE[2:], *asked, "--prompt-tail", 2]
    adaskip_anyhow(*command)
    results = Results(folder / "prompts-runs")
    kept = {one.kept for one in results.read(Answer) if one.setting != "dense"}
    assert min(kept) > 0.75 and max(kept) < 1  # the tail and the answer ran everything
    times = [
        one.model_copy(update={"seconds": 0.9, "dense_seconds": 1.0})
        for one in results.read(Timing)
    ]
    results.replace(Timing, times)
    shutil.rmtree(out, ignore_errors=True)
    adaskip(*command)
    found = Profile.load(out)
    assert (found.method, found.guard, found.prompt) == ("none", False, {"exit": 9, "tail": 2})
    served = AdaSkipConfig.parse({"profile": str(out)}).prompt
    assert served is not None and served.exit == 9
    # Dense is measured whole beside it, though the profile shortens prompts.
    again = ["--data", "bundled:sum", "--limit", 8, "--rounds", 0, "--enforce-eager"]
    adaskip("eval", "--out", folder / "again", "--profile", out, *again)
    by_setting = {one.setting: one.kept for one in Results(folder / "again").read(Answer)}
    assert by_setting["dense"] == 1.0 and by_setting[str(out)] < 1


def test_tune_writes_nothing_where_nothing_qualifies(folder: Path) -> None:
    out = folder / "none"
    said = adaskip("tune", "--out", out, *CUT, status=1)
    assert "no profile" in said and not out.exists()


def test_tune_refuses_one_item_a_task_before_a_model_is_loaded(folder: Path) -> None:
    said = adaskip("tune", "--out", folder / "one", *TUNE, "--limit", 1, status=2)
    assert "at least two items of a task" in said and not (folder / "one-runs").exists()


def a_copy(folder: Path) -> Path:
    """Copy the bundled model with other weights of the same shape."""
    copy = Path(shutil.copytree(bundled_model(), folder))
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1000] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    return copy


def test_tune_does_not_take_the_runs_of_another_model(folder: Path) -> None:
    """Even where the profile was removed: its runs lie beside it."""
    copy = a_copy(folder / "copy")
    said = adaskip("tune", "--out", folder / "none", *CUT, "--model", copy, status=2)
    assert "none-runs holds another run" in said and "its model files is" in said


def test_eval_does_not_give_old_scores_of_a_new_file(folder: Path, tmp_path: Path) -> None:
    """A stranger's commands: the reference was wrong, was mended, and the score stayed."""
    data, prompt = tmp_path / "d.jsonl", "sum : 7 2 + 4 1 = ? answer :"
    asked = [
        "--rounds",
        0,
        "--plans",
        "uniform",
        "--max-compute",
        0.8,
        "--enforce-eager",
        "--data",
        data,
    ]

    def say(reference: str) -> None:
        data.write_text(json.dumps({"prompt": prompt, "reference": reference}) + "\n")

    say("wrong")
    assert "0.000" in adaskip("eval", *asked, "--out", tmp_path / "r")
    say("1 1 3")
    said = adaskip("eval", *asked, "--out", tmp_path / "r", status=2)
    assert "its questions is" in said and "1.000" not in said
    said = adaskip("eval", *asked, "--out", tmp_path / "r2", "--max-tokens", 8)
    assert "1.000" in said
    said = adaskip("eval", *asked, "--out", tmp_path / "r2", status=2)
    assert "its max_tokens is 8, not 32" in said


def test_sweep(folder: Path) -> None:
    said = adaskip("sweep", "--out", folder / "run", "--limit", 4, "--max-block", 1)
    assert "SLEB" in said and (folder / "run" / "sweep.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "nowhere.jsonl"], ["nowhere.jsonl"]),
        (["--method", "nope"], ["'nope'", "allowed"]),
        (["--plans", "nope"], ["'nope'", "uniform, random, exit"]),
        (["--max-compute", "1.5"], ["1.5", "(0, 1]"]),
        (["--skip", "[12]"], ["12", "0 to 11"]),
        (["--skip", "{"], ["JSON"]),
        (["--profile", "nowhere"], ["nowhere", "folder"]),
    ],
)
def test_what_cannot_be_is_refused_before_any_model_is_loaded(
    tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    said = adaskip("eval", "--out", tmp_path / "run", *arguments, status=2)
    assert all(word in said for word in words) and not (tmp_path / "run").exists()


def test_a_newcomers_table_is_asked_by_one_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to where the model would be loaded."""
    asked: list[Item] = []
    monkeypatch.setattr(run, "answer_and_time", lambda *args, **_: asked.extend(args[3]))
    (source := tmp_path / "chats.csv").write_text('question,answer\n"two, and two?",four\n')
    how = ["--columns", "question,answer", "--apply-chat-template", "--metric", "contains"]
    CliRunner().invoke(app, ["eval", "--out", str(tmp_path / "run"), "--data", str(source), *how])
    assert asked == [
        Item("chats/1", "chats", "two, and two? answer :", ("four",), "contains")
    ]  # as the bundled model's template has it
    done = CliRunner().invoke(app, ["eval", "--out", "run", "--data", str(source), "--columns=a"])
    assert done.exit_code == 2 and "PROMPT,REFERENCE" in done.output


def test_answers_that_no_plan_changes_are_pointed_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    items = [Item("a", "t", "sum : 7 =", ("7",), "choice", choices=("7", "8"))]
    run._warn_of_single_tokens(bundled_model(), items)
    assert "1 of 1 items" in (said := " ".join(capsys.readouterr().err.split()))
    assert "under every plan as they do dense" in said
    longer = [Item("a", "t", "sum : 7 =", ("7",), "choice", choices=("7", "8 9"))]
    run._warn_of_single_tokens(bundled_model(), longer)
    assert not capsys.readouterr().err


def documented() -> list[str]:
    """Every adaskip command in the docs, with its continuation lines."""
    found = []
    for page in sorted(DOCS.glob("*.md")):
        prose_and_code = page.read_text().split("```")
        for block in prose_and_code[1::2]:
            lines = block.replace("\\\n", " ").splitlines()
            found += [line for line in lines if line.startswith("adaskip ")]
        for prose in prose_and_code[::2]:
            found += re.findall(r"`(adaskip \w+ [^`]*)`", prose.replace("\n", " "))
    return found


@pytest.mark.parametrize("line", documented())
def test_documented_commands_exist_with_their_options(line: str) -> None:
    words = shlex.split(line)[1:]
    command = typer.main.get_command(app)
    context = typer.Context(command)
    while words and words[0] in getattr(command, "commands", ()):  # a group: `fit first`
        command = command.commands[words.pop(0)]
    command.make_context(command.name, words, parent=context)


def test_the_manifest_is_plain_json(folder: Path) -> None:
    facts = json.loads((folder / "run" / "manifest.json").read_text())
    assert facts["versions"]["vllm"] and facts["hardware"]["cores"] and facts["seed"] == 0
