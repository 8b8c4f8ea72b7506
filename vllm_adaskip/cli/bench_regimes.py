# SPDX-License-Identifier: Apache-2.0
"""``adaskip bench regimes``: what limits a step, by batch and context, and what pays there."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vllm_adaskip.cli.bench import Rounds, effort_for, saying, shapes_of
from vllm_adaskip.cli.run import plain_errors

_BATCHES, _CONTEXTS = (1, 4, 16, 64, 256), (32, 256, 1024, 4096)
#: Tokens of a cell in all, of a small model and a large one.
_SMALL, _LARGE = 1 << 16, 1 << 13


def regimes(
    out: Annotated[Path, typer.Option(help="Folder for regimes.json and regimes.png.")] = Path(
        "build/bench"
    ),
    model: Annotated[str, typer.Option(help="As for adaskip bench.")] = "bundled",
    batch: Annotated[
        list[int] | None, typer.Option(min=1, max=256, help="Repeatable; 1 to 256 if left out.")
    ] = None,
    context: Annotated[
        list[int] | None, typer.Option(min=8, max=8000, help="Repeatable; 32 to 4096.")
    ] = None,
    rounds: Rounds = 3,
) -> None:
    """Time plans without half of the layers, attention or MLPs, shared and mixed, over a grid."""
    console = Console()
    with plain_errors(stopped="stopped; nothing is kept"):
        (shape,) = shapes_of([model], kv_space=3)
        from vllm_adaskip.lab.bench.engines import engine
        from vllm_adaskip.lab.bench.machine import Machine
        from vllm_adaskip.lab.bench.plot import draw_regimes
        from vllm_adaskip.lab.bench.regimes import regimes as measure

        effort = effort_for(shape, rounds)
        tokens = _LARGE if effort.steps < 10 else _SMALL
        cells = product(sorted(batch or _BATCHES), sorted(context or _CONTEXTS))
        grid = [(rows, length) for rows, length in cells if rows * length <= tokens]
        if not grid:
            raise ValueError(f"--batch and --context: more than {tokens} tokens in every cell")
        out.mkdir(parents=True, exist_ok=True)
        with saying(console) as say, TemporaryDirectory() as folder:
            machine = Machine.measure()
            done = say(f"{shape.name}: batch and context", len(grid))
            options = {"max_model_len": 8192, "max_num_seqs": 256, "enable_prefix_caching": True}
            found = []
            with engine(shape.write(Path(folder)), plugin={}, **options) as llm:
                for one in measure(
                    llm, shape, machine, grid, rounds=rounds, steps=max(2, effort.steps // 2)
                ):
                    found.append(one)
                    done()
        text = json.dumps([one.as_json() for one in found], indent=1)
        (out / f"regimes-{shape.name}.json").write_text(text + "\n")
        draw_regimes(found, out / f"regimes-{shape.name}.png")
    kinds = list(dict.fromkeys(kind for one in found for kind in one.gains))
    title = "dense time over the time without half of the layers, attention, MLPs"
    table = Table(
        "batch", "context", "dense step", "limited by", *kinds, box=SIMPLE_HEAD, title=title
    )
    for one in found:
        limit = f"{one.limit} ({one.limits[one.limit]:.0%})"
        gains = (f"{one.gains[kind].middle:.2f}" if kind in one.gains else "" for kind in kinds)
        step = f"{one.seconds * 1e3:.1f} ms"
        table.add_row(str(one.batch), str(one.context), step, limit, *gains)
    console.print(table)
    console.print(f"Written: {out / f'regimes-{shape.name}.json'} and .png")
