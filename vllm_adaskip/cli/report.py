# SPDX-License-Identifier: Apache-2.0
"""``adaskip report``: one HTML page of a run, with what to switch on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    results_dir: Annotated[Path, typer.Argument(help="Folder of a run, as `adaskip eval` wrote.")],
    max_drop: Annotated[
        str, typer.Option(help="Loss of mean score you accept: 1%, '1 point' or 0.01.")
    ] = "1%",
    out: Annotated[
        Path | None, typer.Option(help="The page; report.html in the run's folder if left out.")
    ] = None,
) -> None:
    """Write a page that says what to switch on, what it loses and what it wins."""
    try:
        from vllm_adaskip.lab.evaluation.recommend import parse_max_drop
        from vllm_adaskip.lab.evaluation.report import make_report
    except ModuleNotFoundError as error:
        typer.echo(f"{error.name} is missing: pip install 'vllm-adaskip[eval]'", err=True)
        raise typer.Exit(1) from None
    from vllm_adaskip.lab.evaluation.results import Results

    target = out or results_dir / "report.html"
    try:
        made = make_report(Results(results_dir), parse_max_drop(max_drop))
        target.write_text(made.html, encoding="utf-8")
    except (ValueError, OSError) as error:  # ResultsError, MaxDropError, a page nobody may write
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    typer.echo(made.headline)
    typer.echo(f"the page: {target}")
