# SPDX-License-Identifier: Apache-2.0
"""Zeroes the device code in shared libraries that a card of one generation never loads.

A library of PyTorch or vLLM holds its kernels once for each generation of cards. Zeroes cost
nothing once they are compressed, so what must be carried to a machine without a network shrinks
to a third. Where a kernel has no code for the card, the newest PTX that the card can run stays.

    python slim.py 90 site/torch/lib/*.so site/vllm/*.so
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_MAGIC = struct.pack("<I", 0xBA55ED50)
_PTX, _CUBIN = 1, 2


class Code(NamedTuple):
    """One generation's code in a fat binary: what it is, for which card, and where it lies."""

    kind: int
    card: int
    start: int
    size: int


def slim(data: bytearray, card: int) -> int:
    """Zero in place what a card such as 90 does not load; return how many bytes that were."""
    gone = 0
    for codes in _fat_binaries(bytes(data)):
        own = any((code.kind, code.card) == (_CUBIN, card) for code in codes)
        usable = (code.card for code in codes if code.kind == _PTX and code.card <= card)
        ptx = max(usable, default=0)
        kept = (_CUBIN, card) if own else (_PTX, ptx)
        for code in codes:
            if (code.kind, code.card) != kept:
                data[code.start : code.start + code.size] = bytes(code.size)
                gone += code.size
    return gone


def _fat_binaries(data: bytes) -> Iterator[list[Code]]:
    at = 0
    while (at := data.find(_MAGIC, at)) >= 0:
        version, header, size = struct.unpack_from("<HHQ", data, at + 4)
        end = at + 16 + size
        if version != 1 or header != 16 or end > len(data):
            at += len(_MAGIC)  # these four bytes mean something else
            continue
        codes, entry = [], at + 16
        while entry < end:
            kind, length, size = struct.unpack_from("<HxxIQ", data, entry)
            if not length:
                break
            (card,) = struct.unpack_from("<I", data, entry + 28)
            codes.append(Code(kind, card, entry + length, size))
            entry += length + size
        yield codes
        at = end


if __name__ == "__main__":
    for name in sys.argv[2:]:
        library = bytearray(Path(name).read_bytes())
        gone = slim(library, int(sys.argv[1]))
        Path(name).write_bytes(library)
        print(f"{name}: {gone >> 20} of {len(library) >> 20} MiB zeroed")
