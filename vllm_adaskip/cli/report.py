# SPDX-License-Identifier: Apache-2.0
"""``adaskip report`` and ``adaskip oracle``: what a finished run says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vllm_adaskip.cli.run import plain_errors

if TYPE_CHECKING:
    from vllm_adaskip.lab.evaluation.oracle import Candidates, Oracle


def report(
    results_dir: Annotated[Path, typer.Argument(help="Folder of a run, as `adaskip eval` wrote.")],
    max_loss: Annotated[
        str, typer.Option(help="Loss of mean score you accept: 1%, '1 point' or 0.01.")
    ] = "1%",
    out: Annotated[
        Path | None, typer.Option(help="The page; report.html in the run's folder if left out.")
    ] = None,
) -> None:
    """Write a page that says what to switch on, what it loses and what it wins."""
    try:
        from vllm_adaskip.lab.evaluation.recommend import parse_max_loss
        from vllm_adaskip.lab.evaluation.report import make_report
    except ModuleNotFoundError as error:
        typer.echo(f"{error.name} is missing: pip install 'vllm-adaskip[eval]'", err=True)
        raise typer.Exit(1) from None
    from vllm_adaskip.lab.evaluation.results import Results

    target = out or results_dir / "report.html"
    try:
        made = make_report(Results(results_dir), parse_max_loss(max_loss))
        target.write_text(made.html, encoding="utf-8")
    except (ValueError, OSError) as error:  # ResultsError, MaxLossError, a page nobody may write
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    typer.echo(made.headline)
    for one in made.recommendation.why:
        typer.echo(f"- {one.text}")
    typer.echo(f"the page: {target}")


def oracle(
    results_dir: Annotated[Path, typer.Argument(help="Folder of a run, as `adaskip eval` wrote.")],
    metric: Annotated[str | None, typer.Option(help="Which, where a run has several.")] = None,
) -> None:
    """Find the best plan for each item, and how far every setting is from that ceiling."""
    console = Console()
    with plain_errors():
        from vllm_adaskip.lab.evaluation.oracle import gather, points
        from vllm_adaskip.lab.evaluation.results import Answer, OraclePoint, Results

        results = Results(results_dir)
        candidates = gather(results.manifest(), results.read(Answer), metric)
        others = [one for one in results.read(OraclePoint) if one.metric != candidates.metric]
        results.replace(OraclePoint, [*others, *points(candidates)])
        oracles = {group: candidates.oracle(group) for group in ("skip", "exit")}
        with console.status("weighing every setting against the oracle"):
            tables = _ceiling(candidates, oracles), _distances(candidates, oracles)
    console.print(*tables)


def _ceiling(candidates: Candidates, oracles: dict[str, Oracle]) -> Table:
    """Say how many layers equal quality takes, and how much quality there is."""
    from vllm_adaskip.lab.evaluation.oracle import groups

    dense = candidates.average(candidates.settings[0])
    table = Table(
        *("candidates", "how many", "layers, as good as dense", "of dense", "highest score", "at"),
        title=f"oracle over {len(candidates.scores)} items: a plan for each; dense "
        f"{dense.score:.3f} {candidates.metric} at {dense.layers:.2f} layers",
        caption="it chooses by the references: a ceiling, and luck counts as skill",
        box=SIMPLE_HEAD,
    )
    for group, oracle in oracles.items():
        count = sum(group in groups(setting) for setting in candidates.settings)
        equal, best = oracle.fewest_layers(dense.score), oracle.frontier()[-1]
        saved = f"{equal.layers:.2f}", f"{equal.layers / dense.layers:.1%}"
        table.add_row(group, str(count), *saved, f"{best.score:.3f}", f"{best.layers:.2f}")
    return table


def _distances(candidates: Candidates, oracles: dict[str, Oracle]) -> Table:
    """Compare every setting with the oracle of its own group."""
    from vllm_adaskip.lab.evaluation.oracle import groups

    table = Table(
        *("setting", "oracle", "layers", "score", "score short of it", "layers more than it"),
        caption="short: at the setting's own layers; more: at its own score",
        box=SIMPLE_HEAD,
    )
    for setting in candidates.settings:
        own, group = candidates.average(setting), groups(setting)[0]
        short = oracles[group].best_score(own.layers).score - own.score
        more = own.layers - oracles[group].fewest_layers(own.score).layers
        own_cells = f"{own.layers:.2f}", f"{own.score:.3f}"
        table.add_row(setting.name, group, *own_cells, f"{abs(short):.3f}", f"{abs(more):.2f}")
    return table
