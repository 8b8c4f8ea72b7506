# SPDX-License-Identifier: Apache-2.0
"""What all of ``adaskip ablate`` shares: the run of what is compared, its table and its plot."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vllm_adaskip.classifiers.profile import FILE
from vllm_adaskip.cli import run
from vllm_adaskip.lab.evaluation.results import Answer, Manifest, Results, Setting

if TYPE_CHECKING:
    from vllm_adaskip.lab.data.items import Item
    from vllm_adaskip.lab.evaluation.ablation_plot import Group

ablate = typer.Typer(help="Compare a method with what it must beat, and its parts with each other.")

Out = Annotated[Path, typer.Option(help="Folder for fits and results; a stopped one goes on.")]


def fitted(folder: Path, method: str, arguments: Sequence[object]) -> Path:
    """Fit a method in a process of its own, as a user would, unless the folder has its profile."""
    if not (folder / FILE).exists():
        run.console.print(f"fitting {folder}", markup=False)
        command = [sys.executable, "-c", "from vllm_adaskip.cli.main import main; main()"]
        told = ["fit", method, "--out", folder, *arguments]
        subprocess.run([*command, *map(str, told)], check=True)
    return folder


def compare(
    out: Path,
    manifest: Manifest,
    settings: Sequence[Setting],
    items: list[Item],
    max_tokens: int,
    drawn: Callable[[Group], bool] = lambda group: True,
) -> None:
    """Measure settings through the real engine; print the table of their families, draw them.

    Args:
        out: folder of the results.
        manifest: of the run.
        settings: dense first; those that differ in their seed alone are averaged.
        items: what is asked.
        max_tokens: of an answer.
        drawn: which families' points go into the plot.

    """
    results = Results(out)
    run.answer_and_time(
        results, manifest, settings, items, max_tokens=max_tokens, rounds=0, batch=1
    )
    from vllm_adaskip.lab.evaluation.ablation_plot import draw, groups

    found = groups(run.summarised(results), results.read(Answer))
    draw(filter(drawn, found), out / "ablation.png")
    Console().print(table(found))
    run.console.print(f"plot: {out / 'ablation.png'}; a page: adaskip report {out}")


def table(found: Sequence[Group]) -> Table:
    """Show each family at each share, averaged over seeds."""
    rows = Table(
        *("what", "asked", "of", "compute kept", "score", "loss to dense, points", "worst task"),
        title="95 % bootstrap intervals, paired by item, each item averaged over seeds or draws",
        box=SIMPLE_HEAD,
    )
    for one in found:
        task, loss = one.worst
        rows.add_row(
            one.family,
            one.asked,
            str(one.members),
            f"{one.kept:.1%}",
            f"{one.score:.1%}",
            f"{100 * one.loss.mean:.1f} ({100 * one.loss.low:.1f} to {100 * one.loss.high:.1f})",
            f"{task} {100 * loss:.1f}" if loss > 0 else "",
        )
    return rows
