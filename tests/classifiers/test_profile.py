# SPDX-License-Identifier: Apache-2.0
"""A profile there and back, and every way in which its file can be wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from vllm_adaskip.classifiers.profile import FILE, LARGEST, Profile, ProfileError, fingerprint
from vllm_adaskip.config import AdaSkipConfig, ConfigError

MODEL = {"hidden_size": 8, "num_hidden_layers": 4, "vocab_size": 99, "torch_dtype": "bfloat16"}
PROFILE = Profile(
    method="static",
    options={"skip": [1, "mlp:2"]},
    max_compute=0.9,
    model="some/model",
    fingerprint=fingerprint(MODEL),
    metrics={"drop": 0.004},
)


def test_there_and_back(tmp_path: Path) -> None:
    PROFILE.save(tmp_path / "new" / "profile")
    assert Profile.load(tmp_path / "new" / "profile") == PROFILE


def test_of_another_model_is_refused_with_both_fingerprints() -> None:
    PROFILE.check_model({**MODEL, "torch_dtype": "float32"})
    other = {**MODEL, "num_hidden_layers": 5}
    with pytest.raises(ProfileError) as refusal:
        PROFILE.check_model(other)
    for word in ("some/model", fingerprint(MODEL), fingerprint(other)):
        assert word in str(refusal.value)


def changed(**changes: Any) -> str:
    return json.dumps({**json.loads(PROFILE.model_dump_json()), **changes})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["the file", "JSON"]),
        ("[]", ["the file"]),
        ("\x00\xff", ["utf-8"]),
        ("{" * 10_000, ["the file"]),
        (changed(format=2), ["format", "less than or equal to 1"]),
        (changed(method=3), ["method", "string"]),
        (changed(max_compute=0), ["max_compute", "greater than 0"]),
        (changed(exec="rm"), ["exec", "not permitted"]),
        ("9" * (LARGEST + 1), ["larger than"]),
    ],
)
def test_a_file_that_is_no_profile_is_refused_by_name(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    (tmp_path / FILE).write_text(text, encoding="latin-1")
    with pytest.raises(ProfileError) as refusal:
        Profile.load(tmp_path)
    for word in (FILE, *words):
        assert word in str(refusal.value)


@pytest.mark.parametrize("name", [FILE, "routers.safetensors", "lora/adapter_config.json"])
def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    PROFILE.save(tmp_path)
    path = tmp_path / name
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    with pytest.raises(ConfigError, match=rf"{path.name}: no regular file"):
        AdaSkipConfig.parse({"profile": str(tmp_path)})
    if name == FILE:
        with pytest.raises(ProfileError, match="no regular file"):
            Profile.load(tmp_path)


def test_a_device_is_no_profile_and_a_link_to_one_is(tmp_path: Path) -> None:
    PROFILE.save(tmp_path / "real")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / FILE).symlink_to(tmp_path / "real" / FILE)  # as a hub's cache has it
    assert AdaSkipConfig.parse({"profile": str(tmp_path / "linked")}).method == "static"
    (tmp_path / "linked" / FILE).unlink()
    (tmp_path / "linked" / FILE).symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="no regular file"):
        AdaSkipConfig.parse({"profile": str(tmp_path / "linked")})


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        AdaSkipConfig.parse({"profile": str(tmp_path / "nowhere")})


def test_the_server_takes_method_options_and_budget_from_it(tmp_path: Path) -> None:
    PROFILE.save(tmp_path)
    config = AdaSkipConfig.parse({"profile": str(tmp_path)})
    assert (config.method, config.max_compute) == ("static", 0.9)
    assert config.method_options == {"skip": [1, "mlp:2"]}
    config.check_model(MODEL)
    assert AdaSkipConfig.parse({"profile": str(tmp_path), "max_compute": 0.8}).max_compute == 0.8
    with pytest.raises(ConfigError, match="does not go with profile"):
        AdaSkipConfig.parse({"profile": str(tmp_path), "method": "adaskip"})
    with pytest.raises(ConfigError, match="fingerprint"):
        config.check_model({**MODEL, "hidden_size": 16})


@pytest.mark.parametrize("options", [{"skip": [1], "skp": 2}, {}])
def test_what_a_profile_brings_is_checked_like_what_a_user_writes(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    PROFILE.model_copy(update={"options": options}).save(tmp_path)
    with pytest.raises(ConfigError):
        AdaSkipConfig.parse({"profile": str(tmp_path)})
