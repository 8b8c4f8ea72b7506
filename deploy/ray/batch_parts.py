# SPDX-License-Identifier: Apache-2.0
"""The output of an offline job: whole parts or none, so that it can be resumed."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any


class Parts:
    """A folder of files ``part-000000.jsonl``, each with the same number of rows of the input.

    A file appears under its name when all its rows are in it, and is never written again.
    ``job.json`` tells which input and arguments the folder belongs to. One job writes at a time.
    """

    def __init__(self, folder: Path, job: Mapping[str, Any]) -> None:
        """Open a folder, or make it.

        Raises:
            ValueError: it holds the output of another job, or somebody writes to it now.

        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._lock = (folder / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another job is writing there") from None
        note = folder / "job.json"
        if note.exists():
            self._same(json.loads(note.read_text()), job)
        else:
            self._write(note, json.dumps(job, indent=1, sort_keys=True) + "\n")

    def _same(self, before: Mapping[str, Any], job: Mapping[str, Any]) -> None:
        for key in sorted({*before, *job}):
            if before.get(key) != job.get(key):
                raise ValueError(
                    f"{self.folder}: holds the output of another job ({key} was "
                    f"{before.get(key)!r:.80}, is {job.get(key)!r:.80}); name another folder"
                )

    def path(self, part: int) -> Path:
        """Where a part is, or will be."""
        return self.folder / f"part-{part:06d}.jsonl"

    def is_done(self, part: int) -> bool:
        """Return whether a part is complete."""
        return self.path(part).exists()

    def write(self, part: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write a part, sorted by ``row``; it is there as a whole, or not at all."""
        ordered = sorted(rows, key=lambda row: int(row["row"]))
        lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in ordered)
        self._write(self.path(part), "".join(lines))

    def _write(self, path: Path, text: str) -> None:
        """Write by a file beside it; a machine that fails in between leaves none or all."""
        beside = path.with_suffix(".tmp")
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        with suppress(OSError):  # not every file system can
            os.fsync(folder)
        os.close(folder)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
