# SPDX-License-Identifier: Apache-2.0
"""Short digests of what decides a number, so that a resumed run is told from another one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_adaskip.lab.data.items import Item

#: Files up to this size are read in full; of larger ones the size, the beginning and samples.
WHOLE = 1 << 29
_SAMPLES, _SAMPLE = 1024, 1 << 16


def of_data(value: Any) -> str:
    """Return the digest of plain data, as JSON would store it."""
    return _short(json.dumps(value, sort_keys=True).encode())


def of_items(items: Sequence[Item]) -> str:
    """Return the digest of questions in their order, without how answers are scored."""
    scoring = ("metric", "labels")
    names = [one.name for one in fields(items[0]) if one.compare and one.name not in scoring]
    return of_data([[getattr(item, name) for name in names] for item in items])


def commit_of(config: Any) -> str | None:
    """Return the commit of a hub id, from the config that transformers read; None for a folder."""
    commit: str | None = getattr(config, "_commit_hash", None)
    return commit


def of_model(model: str, commit: str | None) -> str:
    """Return what tells a model from another one of the same shape.

    Of a folder it is the digest of all its files: weights, config, tokenizer, chat template. Of a
    hub id it is the commit, which names the same files.
    """
    if Path(model).is_dir():
        return of_folder(Path(model), ["*"])
    return f"commit {commit}"


def of_folder(folder: Path, patterns: Iterable[str]) -> str:
    """Return the digest of a folder's files, by relative name; hidden files do not count."""
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    names = {path.relative_to(folder).as_posix(): path for path in found}
    return of_data(
        [(name, of_file(names[name])) for name in sorted(names) if not name.startswith(".")]
    )


def of_file(path: Path) -> str:
    """Return SHA-256 of a file; of one above `WHOLE` its size, beginning and even samples.

    The samples are 64 KiB at 1024 places, so that a file of any size takes a second at most. The
    beginning of a safetensors file names all its tensors with their types and shapes.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        found = hashlib.sha256(f"{size} bytes".encode())
        found.update(file.read(1 << 20))
        for index in range(_SAMPLES):
            file.seek((size - _SAMPLE) * index // (_SAMPLES - 1))
            found.update(file.read(_SAMPLE))
    return found.hexdigest()


@cache
def of_code() -> str:
    """Return the digest of this package's own Python files."""
    return of_folder(Path(__file__).parents[1], ["**/*.py"])


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
