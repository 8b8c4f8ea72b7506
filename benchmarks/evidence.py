# SPDX-License-Identifier: Apache-2.0
"""The tables and pictures of docs/evidence.md, from runs of `adaskip eval`.

    python benchmarks/evidence.py RUN                     # a table of all settings
    python benchmarks/evidence.py RUN --draw ffn,ffn-token --picture ffn-skip.png

Each picture shows the settings that are named, by the ends of their names, beside all fixed plans
of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator, PercentFormatter

from vllm_adaskip.lab.evaluation.results import Answer, Results, Timing
from vllm_adaskip.lab.evaluation.settings import PLAN_FAMILIES
from vllm_adaskip.lab.evaluation.summary import SettingSummary, Summary, summarise

Value = Callable[[SettingSummary], float]


def main(
    run: Annotated[Path, typer.Argument(help="Folder that `adaskip eval` wrote.")],
    draw: Annotated[str, typer.Option(help="Settings to draw, by the ends of their names.")] = "",
    picture: Annotated[Path, typer.Option(help="Where to draw them.")] = Path("evidence.png"),
) -> None:
    """Print a run's settings as a table, or draw some beside its fixed plans."""
    results = Results(run)
    summary = summarise(results.manifest(), results.read(Answer), results.read(Timing))
    if draw:
        names = draw.split(",")
        shown(summary, [one for one in summary.others if called(one) in names], picture)
        return
    print("| setting | compute left out | score | loss, points | agreement | surprise |")
    print("|---|---|---|---|---|---|")
    for one in summary.settings:
        print(row(one, one is summary.dense))


def called(one: SettingSummary) -> str:
    """Return a setting's name, a profile's without its folder."""
    return one.name.rpartition("p/")[2]


def row(one: SettingSummary, is_dense: bool) -> str:
    """Return a line of the table."""
    score, reading = one.score, one.reading
    loss, told = "", ["", ""]
    if score and not is_dense:
        points = (100 * each for each in (score.loss.mean, score.loss.low, score.loss.high))
        loss = "{:.1f} ({:.1f} to {:.1f})".format(*points)
    if reading:
        told = [f"{reading.agreement:.1%}", f"{reading.surprise:.3f}"]
    mean = f"{100 * score.mean:.1f}" if score else ""
    return f"| {called(one)} | {1 - one.kept:.1%} | {mean} | {loss} | {told[0]} | {told[1]} |"


def shown(summary: Summary, chosen: Sequence[SettingSummary], path: Path) -> None:
    """Draw score and agreement against compute kept."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    sides: Iterable[tuple[Axes, str, Value]] = zip(
        figure.subplots(1, 2),
        ("score", "tokens that the whole model would have chosen"),
        (
            lambda one: one.score.mean if one.score else 0.0,
            lambda one: one.reading.agreement if one.reading else 0.0,
        ),
        strict=True,
    )
    for axes, label, value in sides:
        axes.axhline(value(summary.dense), color="black", linewidth=0.8, label="dense")
        for family, marker in zip(PLAN_FAMILIES, "sx^", strict=True):
            own = sorted(
                (one for one in summary.others if one.setting.family == family),
                key=lambda one: one.kept,
            )
            points = [1 - one.kept for one in own], [value(one) for one in own]
            line = "none" if family == "random" else "-"
            axes.plot(*points, marker=marker, linestyle=line, alpha=0.55, label=family)
        for one in chosen:
            axes.plot(1 - one.kept, value(one), "o", markersize=8, label=called(one))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.xaxis.set_major_locator(MultipleLocator(0.05))
        axes.set(xlabel="decoder compute left out", ylabel=label, xlim=(0, None), ylim=(0, 1.05))
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    typer.run(main)
