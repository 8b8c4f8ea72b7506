# SPDX-License-Identifier: Apache-2.0
"""``adaskip bench guard``: a fast subset whose ratios must not fall."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vllm_adaskip.cli.bench import saying, shapes_of
from vllm_adaskip.cli.run import plain_errors


def guard(
    tries: Annotated[
        int, typer.Option(min=1, help="Measured anew so often before a ratio counts as fallen.")
    ] = 3,
) -> None:
    """Exit with 1 when a ratio on the bundled model's shape stays below its floor."""
    console = Console()
    with plain_errors(stopped="stopped; nothing is kept"):
        shapes_of(["bundled"])
        from vllm_adaskip.lab.bench.guard import guard as measure

        for _ in range(tries):
            with saying(console) as say, TemporaryDirectory() as folder:
                found = measure(Path(folder), say)
            table = Table("time of / time of", "floor", "found", "", box=SIMPLE_HEAD)
            fallen = [name for name, floor, ratio in found if ratio.middle < floor]
            for name, floor, ratio in found:
                word = "[red]fallen[/]" if name in fallen else ""
                table.add_row(name, f"{floor:g}", str(ratio), word)
            console.print(table)
            if not fallen:
                return
    raise typer.Exit(1)
