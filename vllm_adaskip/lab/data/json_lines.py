# SPDX-License-Identifier: Apache-2.0
"""JSON lines as the format says: UTF-8, one object a line, ended by a newline and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_ONE_A_LINE = "allowed: one JSON object a line"


class JsonError(ValueError):
    """Text that is not the JSON that is wanted; the message says what was found."""


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | JsonError]]:
    """Return each line by its number, as its object or as what is wrong with it; no blank lines."""
    with path.open("rb") as lines:  # as bytes, which are split at newlines alone
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield number, parsed_object(line)
            except JsonError as error:
                yield number, error


def parsed_object(text: bytes) -> dict[str, Any]:
    """Return the object of one line (`JsonError`: it is none)."""
    try:
        found = parsed(text)
    except JsonError as error:
        line = text.strip()
        spread = line[:1] in (b"{", b"[") and line[-1:] not in (b"}", b"]")
        rest = ", not spread over several" if spread else ""
        raise JsonError(f"{error}; {_ONE_A_LINE}{rest}") from None
    if isinstance(found, dict):
        return found
    what = "an array" if isinstance(found, list) else type(found).__name__
    raise JsonError(f"the line is {what}, {found!s:.60}; {_ONE_A_LINE}")


def parsed(text: bytes) -> Any:
    """Return the value of a JSON text, with or without a byte-order mark (`JsonError`: none)."""
    try:
        return json.loads(
            text.decode("utf-8-sig"), object_pairs_hook=_unique, parse_constant=_no_number
        )
    except UnicodeDecodeError as error:
        what = "UTF-16" if text[:2] in (b"\xff\xfe", b"\xfe\xff") else f"byte {error.start + 1}"
        raise JsonError(f"no UTF-8: {what}; allowed: UTF-8") from None
    except RecursionError:
        raise JsonError("nested too deeply") from None
    except JsonError:
        raise
    except ValueError as error:
        raise JsonError(f"no JSON: {error}") from None


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise JsonError(f"key {twice!r:.80} comes twice")
    return found


def _no_number(name: str) -> Any:
    raise JsonError(f"{name} is no JSON; allowed: numbers, null")
