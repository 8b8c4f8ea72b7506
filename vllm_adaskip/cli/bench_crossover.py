# SPDX-License-Identifier: Apache-2.0
"""``adaskip bench crossover``: from how many rows on a sub-layer is run for all, here."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vllm_adaskip.cli.bench import effort_for, saying, shapes_of
from vllm_adaskip.cli.run import plain_errors


def crossover(
    out: Annotated[
        Path, typer.Option(help="File for the table, for option adaskip.crossover.")
    ] = Path("build/crossover.json"),
    model: Annotated[
        str, typer.Option(help="As for adaskip bench: the model that will be served.")
    ] = "bundled",
    context: Annotated[
        int, typer.Option(min=1, max=4096, help="Tokens up to which attention's part holds.")
    ] = 64,
    largest: Annotated[int, typer.Option(min=2, max=128, help="Largest batch measured.")] = 64,
) -> None:
    """Measure when running a sub-layer for everybody is cheaper than gathering rows for it."""
    console = Console()
    with plain_errors(stopped="stopped; nothing is kept"):
        (shape,) = shapes_of([model])
        from vllm_adaskip.lab.bench.crossover import SIZES
        from vllm_adaskip.lab.bench.variants import measured_crossover

        sizes = [size for size in SIZES if size <= largest]
        steps = 3 * effort_for(shape, 2).steps
        with saying(console) as say, TemporaryDirectory() as folder:
            found = measured_crossover(
                shape, Path(folder), sizes, say, steps=steps, context=context
            )
        out.parent.mkdir(parents=True, exist_ok=True)
        draft = out.with_name(out.name + ".part")
        draft.write_text(found.model_dump_json(indent=1) + "\n")
        draft.replace(out)
    table = Table(
        "tokens of a step",
        "attention",
        "MLP",
        "both of a layer",
        box=SIMPLE_HEAD,
        title="run for all from",
    )
    for rows in zip(found.attention, found.mlp, found.layer, strict=True):
        size = rows[0][0]
        table.add_row(str(size), *(f"{one} rows" if one < size else "never" for _, one in rows))
    console.print(table)
    console.print(f"Written: {out}")
