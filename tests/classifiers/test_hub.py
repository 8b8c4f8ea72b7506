# SPDX-License-Identifier: Apache-2.0
"""Profiles go to a hub and come back through `huggingface_hub`, and only what a profile holds."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.hub import hub

from vllm_adaskip.classifiers.hub import cell, located, readable
from vllm_adaskip.classifiers.profile import FILE, Profile, ProfileError

PROFILE = Profile(method="first", model="/home/me/secret", fingerprint="f00", metrics={"x": 0.5})
Run = Callable[[str], "subprocess.CompletedProcess[str]"]


@pytest.fixture
def server() -> Iterator[Any]:
    with hub() as server:
        yield server


@pytest.fixture
def run(server: Any, tmp_path: Path) -> Run:
    """Run a line in a process that finds the hub, which it looks for when it is imported."""
    env = {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_x"}
    names = "from vllm_adaskip.classifiers.hub import located, publish\nfrom pathlib import Path\n"

    def run(code: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", names + code]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    return run


def test_published_and_found_again(server: Any, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "profile"
    PROFILE.save(folder)
    (folder / "lora").mkdir()
    for name in ("routers.safetensors", "lora/adapter_config.json", "notes.txt", "evil.bin"):
        (folder / name).write_text("x")
    done = run(f"print(publish(Path({str(folder)!r}), 'me/mine'))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{server.address}/me/mine"
    kept = {FILE, "routers.safetensors", "lora/adapter_config.json", "README.md"}
    assert set(server.files["me/mine"]) == kept
    card = server.files["me/mine"]["README.md"].decode()
    assert "profile me/mine" in card and "| x | 0.5 |" in card and "secret" not in card
    server.files["me/mine"]["evil.pkl"] = b"x"
    for _ in range(2):  # from the hub, then from the cache
        done = run("print(located('me/mine@main'))")
        assert done.returncode == 0, done.stderr
    found = Path(done.stdout.strip())
    assert Profile.load(found) == PROFILE
    assert {str(one.relative_to(found)) for one in found.rglob("*.*")} == kept - {"README.md"}


def test_what_is_no_profile_is_not_published(server: Any, run: Run, tmp_path: Path) -> None:
    done = run(f"publish(Path({str(tmp_path)!r}), 'me/mine')")
    assert "ProfileError" in done.stderr and FILE in done.stderr and not server.files


def test_what_the_hub_does_not_have(run: Run) -> None:
    done = run("located('me/nothing')")
    assert "ProfileError" in done.stderr and "'me/nothing'" in done.stderr


@pytest.mark.parametrize(
    "name", ["", "nowhere", "../x/y", "a/b/c", "https://x/y", "ä/b", "a" * 999]
)
def test_what_is_neither_folder_nor_hub_id(name: str) -> None:
    with pytest.raises(ProfileError, match="allowed: a folder, or a hub id"):
        located(name)


def test_figures_in_words_with_their_intervals() -> None:
    told = {"agreement": 0.9, "agreement_low": 0.8, "agreement_high": 1.0, "floor_low": 1, "x_y": 2}
    found = dict(readable(told))
    (whose,) = [name for name in found if "whole model" in name]
    assert found[whose] == "0.9 (0.8 to 1.0)"
    assert {"floor low": "1", "x y": "2"}.items() <= found.items() and len(found) == 3
    assert cell("a|b\n[c](d) <e>") == r"a\|b \[c\]\(d\) \<e\>"
