# SPDX-License-Identifier: Apache-2.0
"""The tables and pictures of docs/evidence.md, from runs of `adaskip eval` and `adaskip sweep`.

python benchmarks/evidence.py table RUN
python benchmarks/evidence.py draw RUN ffn,ffn-token --picture ffn-skip.png
python benchmarks/evidence.py sweep RUN --picture sweep.png
python benchmarks/evidence.py oracle RUN --metric contains --picture oracle.png
python benchmarks/evidence.py own RUN --out own.jsonl --ended

A setting is named by the end of its name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator, PercentFormatter

from vllm_adaskip.lab.evaluation.oracle import gather
from vllm_adaskip.lab.evaluation.results import Answer, Question, Results, SweepCell, Timing
from vllm_adaskip.lab.evaluation.settings import PLAN_FAMILIES
from vllm_adaskip.lab.evaluation.summary import SettingSummary, Summary, summarise
from vllm_adaskip.lab.evaluation.sweep import overall

Value = Callable[[SettingSummary], float]
Run = Annotated[Path, typer.Argument(help="Folder that `adaskip eval` or `sweep` wrote.")]
Picture = Annotated[Path, typer.Option(help="Where to draw.")]
#: Of a sweep's picture: what was done, how many layers it concerned, what the line is called.
DAMAGES = (
    ("delete", 1, "one layer deleted"),
    ("delete", 2, "it and the next deleted"),
    ("swap", 2, "it and the next exchanged"),
)
app = typer.Typer(help=__doc__, pretty_exceptions_enable=False)


@app.command()
def table(run: Run) -> None:
    """Print a run's settings as a table."""
    summary = _summary(run)
    print("| setting | compute left out | score | loss, points | agreement | surprise |")
    print("|---|---|---|---|---|---|")
    for one in summary.settings:
        print(row(one, one is summary.dense))


@app.command()
def draw(
    run: Run,
    names: Annotated[str, typer.Argument(help="Settings to draw, by the ends of their names.")],
    picture: Picture = Path("evidence.png"),
) -> None:
    """Draw some settings of a run beside its fixed plans."""
    summary, chosen = _summary(run), names.split(",")
    shown(summary, [one for one in summary.others if called(one) in chosen], picture)


@app.command()
def sweep(run: Run, picture: Picture = Path("sweep.png")) -> None:
    """Draw what a model still says with one or two layers deleted or exchanged."""
    cells: dict[tuple[str, tuple[int, ...]], list[SweepCell]] = {}
    for cell in Results(run).read(SweepCell):
        cells.setdefault((cell.kind, tuple(cell.layers)), []).append(cell)
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    for (kind, count, label), marker in zip(DAMAGES, "os^", strict=True):
        found = {
            layers[0]: 100 * overall(some)[0]
            for (which, layers), some in sorted(cells.items())
            if which == kind and len(layers) == count and layers[-1] - layers[0] == count - 1
        }
        axes.plot([*found], [*found.values()], marker=marker, markersize=4, label=label)
    axes.set(xlabel="layer", ylabel="likeliest token as whole, %", ylim=(0, 101), xlim=(-0.5, None))
    _save(figure, axes, picture)


@app.command()
def oracle(
    run: Run,
    metric: Annotated[str | None, typer.Option(help="Which, where a run has several.")] = None,
    picture: Picture = Path("oracle.png"),
) -> None:
    """Draw the best allotment of a run's plans to its questions, above the settings themselves."""
    results = Results(run)
    candidates = gather(results.manifest(), results.read(Answer), metric)
    figure = Figure(figsize=(6.5, 3.8), layout="constrained")
    axes = figure.subplots()
    for group, label in (("skip", "a plan for each question"), ("exit", "an exit for each")):
        points = candidates.oracle(group).frontier()
        axes.plot(
            [one.layers for one in points], [one.score for one in points], label=f"oracle: {label}"
        )
    own = [candidates.average(one) for one in candidates.settings]
    axes.plot(
        [one.layers for one in own[1:]], [one.score for one in own[1:]], "x",
        label="one setting for all",
    )  # fmt: skip
    axes.plot(own[0].layers, own[0].score, "k*", markersize=10, label="dense")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set(xlabel="layers a token goes through", ylabel=candidates.metric, ylim=(0, None))
    _save(figure, axes, picture)


@app.command()
def own(
    run: Run,
    out: Annotated[Path, typer.Option(help="File of JSON lines.")],
    ended: Annotated[bool, typer.Option(help="Only answers that ended by themselves.")] = False,
) -> None:
    """Write a run's questions with the whole model's own answers as references, to fit on."""
    results = Results(run)
    prompts = {one.item: one.prompt for one in results.read(Question)}
    answers = [one for one in results.read(Answer) if one.setting == "dense" and one.text.strip()]
    longest = max(one.tokens for one in answers)
    with out.open("w") as file:
        for one in answers:
            if not (ended and one.tokens == longest):
                line = {"task": one.task, "prompt": prompts[one.item], "reference": one.text}
                file.write(json.dumps(line) + "\n")


def _save(figure: Figure, axes: Any, picture: Path) -> None:
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(picture, dpi=110)


def _summary(run: Path) -> Summary:
    results = Results(run)
    return summarise(results.manifest(), results.read(Answer), results.read(Timing))


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
    app()
