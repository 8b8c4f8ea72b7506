# SPDX-License-Identifier: Apache-2.0
"""The leaderboard is what its entries say, and hostile entries are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_adaskip.classifiers.profile import Profile
from vllm_adaskip.lab.scan.leaderboard import LeaderboardError, entry, main, page, read

DOCS = Path(__file__).parents[2] / "docs"
METRICS: dict[str, Any] = {
    "model": "org/name",
    "left_out": "5-6, attn:7",
    "compute_kept": 0.9,
    "agreement": 0.96,
    "agreement_low": 0.95,
    "agreement_high": 0.97,
    "surprise": 0.01,
    **{
        f"time_ratio_batch_{batch}{end}": value
        for batch in (1, 16)
        for end, value in (("", 0.9), ("_low", 0.89), ("_high", 0.91))
    },
    "machine": "a|b, 2 cores",
    "engine": "compiled",
    "vllm": "0.32.0",
    "command": "adaskip scan org/name --out x",
}


def write(path: Path, **changed: Any) -> Path:
    told = {key: value for key, value in (METRICS | changed).items() if value is not None}
    profile = {"method": "static", "model": "org/name", "fingerprint": "f00", "metrics": told}
    path.write_text(json.dumps(profile))
    return path


def test_the_page_is_what_the_entries_generate() -> None:
    assert (DOCS / "leaderboard.md").read_text() == page(read(DOCS / "leaderboard"))


def test_a_line_of_an_entry(tmp_path: Path) -> None:
    (folder := tmp_path / "board").mkdir()
    write(folder / "b.json")
    write(folder / "a.json", time_ratio_batch_16=0.895)
    main(folder)
    first, second = (tmp_path / "board.md").read_text().splitlines()[-2:]
    assert first.startswith("| org/name | 5-6, attn:7 | 96.0% (95.0% to 97.0%) | 0.010 | 0.90")
    assert r"| a\|b, 2 cores |" in second and first.replace(r"\|", "").count("|") == 10
    Profile.model_validate_json((folder / "a.json").read_text())


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model": "[x](http://evil)"}, "model: String should match"),
        ({"model": "/home/me/secret"}, "model: String should match"),
        ({"left_out": "5 | 6"}, "left_out: String should match"),
        ({"machine": "one\ntwo"}, "machine: String should match"),
        ({"command": "x" * 301}, "command: String should match"),
        ({"agreement": 1e300}, "agreement: Input should be less than"),
        ({"agreement": 0.5}, "agreement 0.5 is outside 0.95 to 0.97"),
        ({"time_ratio_batch_16": float("nan")}, "time_ratio_batch_16"),
        ({"time_ratio_batch_16": 1e9}, "time_ratio_batch_16: Input should be less than"),
        ({"surprise": None}, "surprise: Field required"),
        ({"more": 1}, "more: Extra inputs"),
    ],
)
def test_hostile_entries(tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    path = write(tmp_path / "x.json", **changed)
    with pytest.raises(LeaderboardError, match=r"x\.json") as found:
        entry(path)
    assert words in str(found.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"metrics": {}}', " " * (2 << 20)])
def test_no_profile(tmp_path: Path, text: str) -> None:
    (path := tmp_path / "x.json").write_text(text)
    with pytest.raises(LeaderboardError, match=r"x\.json"):
        entry(path)
