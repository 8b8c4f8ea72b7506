# SPDX-License-Identifier: Apache-2.0
"""``adaskip bench curves``: how planning a step grows with layers, sequences and plans."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


def curves() -> None:
    """Time the host's work of planning a step, which is done whenever the batch changes."""
    from vllm_adaskip.lab.bench.curves import curves as measure

    title = "planning a step: 32 layers, 256 sequences, 64 distinct plans, but for what grows"
    table = Table("what grows", "to", "time", "fitted power", box=SIMPLE_HEAD, title=title)
    for curve in measure():
        for size, seconds in curve.seconds.items():
            table.add_row(curve.what, str(size), f"{seconds * 1e3:.2f} ms", f"{curve.exponent:.2f}")
        table.add_section()
    Console().print(table)
