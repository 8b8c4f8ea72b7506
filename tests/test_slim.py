# SPDX-License-Identifier: Apache-2.0
"""Which device code stays in a library that is packed for one card."""

from __future__ import annotations

import importlib.util
import struct
from typing import Any

import pytest
from helpers.readme import ROOT

PTX, CUBIN = 1, 2


@pytest.fixture(scope="module")
def slim() -> Any:
    spec = importlib.util.spec_from_file_location("slim", ROOT / "deploy" / "gpu" / "slim.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.slim


def fat_binary(*codes: tuple[int, int, bytes]) -> bytes:
    entries = b""
    for kind, card, code in codes:
        head = struct.pack("<HHIQ", kind, 0, 64, len(code)) + bytes(12) + struct.pack("<I", card)
        entries += head.ljust(64, b"\1") + code
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entries)) + entries


def test_a_cards_own_code_stays_and_all_else_is_zeroed(slim: Any) -> None:
    codes = (CUBIN, 80, b"eighty"), (CUBIN, 90, b"ninety"), (PTX, 90, b"text")
    data = bytearray(b"before" + fat_binary(*codes) + b"after")
    size = len(data)
    assert slim(data, 90) == len(b"eightytext") and len(data) == size
    assert b"ninety" in data and b"eighty" not in data and b"text" not in data
    assert data.startswith(b"before") and data.endswith(b"after")


def test_where_a_card_has_no_code_the_newest_ptx_that_it_compiles_stays(slim: Any) -> None:
    data = bytearray(
        fat_binary((CUBIN, 80, b"cubin"), *((PTX, n, b"t%d" % n) for n in (75, 80, 100)))
    )
    slim(data, 90)
    assert b"t80" in data and not any(gone in data for gone in (b"cubin", b"t75", b"t100"))


def test_each_fat_binary_is_judged_by_itself(slim: Any) -> None:
    data = bytearray(fat_binary((CUBIN, 90, b"one")) + fat_binary((CUBIN, 80, b"two")))
    slim(data, 90)
    assert b"one" in data and b"two" not in data


@pytest.mark.parametrize("tail", [b"", b"\0" * 12, struct.pack("<HHQ", 1, 16, 1 << 40)])
def test_the_same_four_bytes_elsewhere_are_left_alone(slim: Any, tail: bytes) -> None:
    data = bytearray(struct.pack("<I", 0xBA55ED50) + tail.ljust(12, b"\7"))
    whole = bytes(data)
    assert slim(data, 90) == 0 and bytes(data) == whole
