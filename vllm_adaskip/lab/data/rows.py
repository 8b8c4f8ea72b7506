# SPDX-License-Identifier: Apache-2.0
"""Rows of a data file, with where each stands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_adaskip.lab.data.items import DataError
from vllm_adaskip.lab.data.json_lines import JsonError, parsed, read_lines

Rows = Iterator[tuple[str, dict[str, Any]]]


def read_rows(path: Path) -> Rows:
    """Return the rows of a file of JSON lines, or of one JSON array.

    Raises:
        DataError: a file that cannot be read, or a row that is none.

    """
    try:
        yield from _array(path) if _begins_as_array(path) else _lines(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def _lines(path: Path) -> Rows:
    for number, found in read_lines(path):
        if isinstance(found, JsonError):
            raise DataError(f"{path}:{number}: {found}")
        yield f"{path}:{number}", found


def _begins_as_array(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1 << 12).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _array(path: Path) -> Rows:
    try:
        found = parsed(path.read_bytes())
    except JsonError as error:
        raise DataError(f"{path}: begins as a JSON array, but {error}") from None
    for number, row in enumerate(found, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path}: row {number} is {row!r:.60}; allowed: JSON objects")
        yield f"{path}: row {number}", row
