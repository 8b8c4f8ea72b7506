# SPDX-License-Identifier: Apache-2.0
"""Names of before 0.2: each works, with one warning a process, and not beside its new one."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vllm_adaskip
from vllm_adaskip import DecoderShape, old_names
from vllm_adaskip.classifiers.profile import Profile, ProfileError
from vllm_adaskip.cli import main
from vllm_adaskip.config import AdaSkipConfig, ConfigError
from vllm_adaskip.engine.request import KEYS, EngineFacts, Planner, RequestArgs, RequestError
from vllm_adaskip.lab.evaluation.results import Setting
from vllm_adaskip.lab.evaluation.settings import decided

SHAPE = DecoderShape(8, attention_parameters=1, mlp_parameters=3)
LOAD: dict[str, Any] = {"enter": {"waiting": 4}, "leave": {"waiting": 1}}


def busy(share: str, seconds: str) -> dict[str, Any]:
    """Return the options of a server with two levels of load."""
    levels = [{share: kept, **LOAD} for kept in (0.9, 0.8)]
    return {"busy": {seconds: 2.0, "levels": levels}}


#: Options with one old name, the same options now, and both names.
OPTIONS: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    ({"budget": 0.7}, {"max_compute": 0.7}, "adaskip.budget", "max_compute"),
    ({"coalesce": 0.1}, {"coalesce_regret": 0.1}, "adaskip.coalesce", "coalesce_regret"),
    ({"speculate": {"exit": 2}}, {"draft": {"exit": 2}}, "adaskip.speculate", "draft"),
    ({"method": "similarity"}, {"method": "adaskip"}, "method similarity", "adaskip"),
    (
        busy("max_compute", "dwell"),
        busy("max_compute", "min_seconds"),
        "adaskip.busy.dwell",
        "min_seconds",
    ),
    (
        busy("budget", "min_seconds"),
        busy("max_compute", "min_seconds"),
        "adaskip.busy.levels[].budget",
        "max_compute",
    ),
]


@pytest.fixture(autouse=True)
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Return the warnings of a process that has said nothing so far."""
    found: list[str] = []
    monkeypatch.setattr(old_names, "_warned", set())
    monkeypatch.setattr(old_names.logger, "warning", found.append)
    yield found
    assert len(found) == len({*found})


def warning(old: str, new: str) -> str:
    return f"vllm-adaskip: {old} is called {new} since 0.2; the old name works until 0.3"


@pytest.mark.parametrize(("old", "new", "was", "now"), OPTIONS)
def test_a_server_takes_them(
    old: dict[str, Any], new: dict[str, Any], was: str, now: str, said: list[str]
) -> None:
    want = AdaSkipConfig.parse(new)
    assert said == []
    for _ in range(2):
        assert AdaSkipConfig.parse(old) == want
        assert AdaSkipConfig.of({"adaskip": old}) == want
    place = "" if was.startswith("method") else "option "
    assert said == [warning(f"{place}{was}", now)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": 0.7, "max_compute": 0.7}, ["max_compute", "budget"]),
        ({"coalesce": 0, "coalesce_regret": 0}, ["coalesce_regret", "coalesce,"]),
        ({"speculate": {"exit": 2}, "draft": {"exit": 2}}, ["draft", "speculate"]),
        ({"busy": {"dwell": 1, "min_seconds": 1}}, ["adaskip.busy", "min_seconds", "dwell"]),
        (
            {"busy": {"levels": [{"budget": 0.5, "max_compute": 0.5, **LOAD}]}},
            ["adaskip.busy.levels.0", "max_compute", "budget"],
        ),
    ],
)
def test_a_server_takes_one_of_both(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError, match="its old name; leave") as refusal:
        AdaSkipConfig.parse(options)
    assert all(word in str(refusal.value) for word in words)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"budgets": 0.7}, "budgets: unknown option"),
        ({"dwell": 1}, "dwell: unknown option"),
        ({"busy": {"budget": 0.5, "levels": [{"max_compute": 0.5, **LOAD}]}}, "budget: unknown"),
        ({"method": "similar"}, "'similar' is no method"),
        ({"budget": 2}, "adaskip.max_compute: 2"),
    ],
)
def test_what_never_was_a_name_is_refused_as_before(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        AdaSkipConfig.parse(options)


def test_an_old_name_beside_our_options_is_read_by_nobody_either() -> None:
    with pytest.raises(ConfigError, match="nobody reads budget there"):
        AdaSkipConfig.of({"adaskip": {}, "budget": 0.5})


def test_a_profile_takes_them(tmp_path: Path, said: list[str]) -> None:
    made = Profile(method="adaskip", max_compute=0.7, model="m", fingerprint="f")
    made.save(tmp_path)
    file = tmp_path / "adaskip.json"
    now = json.loads(file.read_text())
    assert now["max_compute"] == 0.7 and "budget" not in now
    before = {**now, "method": "similarity", "budget": now.pop("max_compute")}
    del before["max_compute"]
    file.write_text(json.dumps(before))
    assert Profile.load(tmp_path) == made
    assert {*said} == {
        warning("adaskip.json: budget", "max_compute"),
        warning("method similarity", "adaskip"),
    }
    served = AdaSkipConfig.parse({"profile": str(tmp_path), "method": "similarity", "budget": 0.6})
    assert (served.method, served.max_compute) == ("adaskip", 0.6)
    file.write_text(json.dumps({**before, "max_compute": 0.7}))
    with pytest.raises(ProfileError, match="max_compute does not go with budget, its old name"):
        Profile.load(tmp_path)


def test_a_request_takes_them(said: list[str]) -> None:
    planner = Planner(EngineFacts(SHAPE, "static", {"skip": [1], "ladder": [[1, 2]]}))
    old, new = ({key: 0.75} for key in ("adaskip_budget", "adaskip_max_compute"))
    want = planner.wanted(new)
    assert want.plan is not None and want.plan.entries() == [1, 2] and said == []
    assert planner.wanted(old) == planner.wanted(old) == want
    assert said == [warning("request argument adaskip_budget", "adaskip_max_compute")]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"adaskip_budget": 2}, "adaskip_max_compute: 2 is not allowed"),
        ({"adaskip_budget": 1, "adaskip_max_compute": 1}, "does not go with adaskip_budget"),
        ({"adaskip_budget": 1, "adaskip": "off"}, "does not go with adaskip_max_compute"),
        ({"adaskip_budgets": 1}, "adaskip_budgets: unknown argument"),
    ],
)
def test_a_wrong_request_is_refused_by_the_new_name(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words) as refusal:
        RequestArgs.parse(arguments)
    assert "adaskip_budget" not in KEYS and refusal.value.reason != "adaskip_budget"


def test_offline_requests_take_them(said: list[str]) -> None:
    for _ in range(2):
        assert vllm_adaskip.request(budget=0.5) == {"adaskip_max_compute": 0.5}
    assert said == [warning("vllm_adaskip.request: budget", "max_compute")]
    with pytest.raises(ValueError, match="max_compute does not go with budget, its old name"):
        vllm_adaskip.request(budget=0.5, max_compute=0.5)


def test_evaluation_takes_the_method_and_reads_earlier_results(said: list[str]) -> None:
    (setting,) = decided("similarity", {}, [0.75])
    assert (setting.name, setting.family, setting.method) == ("adaskip 0.75", "adaskip", "adaskip")
    stored = {"name": "similarity 0.75", "family": "similarity", "method": "similarity"}
    read = Setting.model_validate({**stored, "budget": 0.75})
    assert (read.name, read.method, read.budget) == ("similarity 0.75", "adaskip", 0.75)
    assert said == [warning("method similarity", "adaskip")]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("eval --budget 0.9 --budget=0.75", "eval --max-compute 0.9 --max-compute=0.75"),
        ("tune --out a --max-drop 0.1", "tune --out a --max-loss 0.1"),
        ("report --max-drop=1% runs", "report --max-loss=1% runs"),
        ("bench load --budget 0.5", "bench load --max-compute 0.5"),
        ("bench drafts --speculate {}", "bench drafts --draft {}"),
        ("fit similarity --out a", "fit adaskip --out a"),
        ("serve m --budget 1", "serve m --budget 1"),
        ("eval --method exit", "eval --method exit"),
        ("", ""),
    ],
)
def test_the_command_takes_them_and_says_so_on_stderr(
    old: str, new: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run: list[list[str]] = []
    monkeypatch.setattr(main, "app", run.append)
    monkeypatch.setattr(sys, "argv", ["adaskip", *old.split()])
    for _ in range(2):
        main.main()
    assert run == [new.split()] * 2
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.splitlines()
    assert len(lines) == (old != new)
    assert all("vllm-adaskip: adaskip " in line and "until 0.3" in line for line in lines)


def test_the_command_takes_one_of_both(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["adaskip", "eval", "--budget", "1", "--max-compute=0.9"])
    with pytest.raises(SystemExit, match="2"):
        main.main()
    assert "--max-compute does not go with --budget, its old name" in capsys.readouterr().err


def test_the_page_lists_them() -> None:
    page = (Path(__file__).parents[1] / "docs" / "options.md").read_text()
    _, _, table = page.partition("## Old names")
    for names in old_names.NEW.values():
        assert all(f"`{old}`" in table and f"`{new}`" in table for old, new in names.items())
    assert f"until {old_names.REMOVED}" in table and f"before {old_names.SINCE}" in table


def test_no_new_name_is_an_old_one() -> None:
    for names in old_names.NEW.values():
        assert not names.keys() & {*names.values()}
