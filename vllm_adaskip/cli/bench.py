# SPDX-License-Identifier: Apache-2.0
"""``adaskip bench``: what skipping is worth on the clock, on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from vllm_adaskip.cli.run import plain_errors

if TYPE_CHECKING:
    from vllm_adaskip.lab.bench.results import Results
    from vllm_adaskip.lab.bench.shapes import Shape
    from vllm_adaskip.lab.bench.variants import Effort, Say

COLUMNS = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
#: Parameters above which a step takes so long that few of them tell enough.
_LARGE = 1e8

Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        help="bundled, smollm2-135m, llama-3.2-1b, tinyllama-1.1b, opt-1.3b, or a folder with a "
        "config; repeatable. If left out: bundled and llama-3.2-1b.",
    ),
]
Rounds = Annotated[int, typer.Option(min=2, help="Turns that each variant takes.")]

bench = typer.Typer(help="Time skipping beside stock vLLM.", invoke_without_command=True)


@bench.callback()
def table(
    context: typer.Context,
    model: Models = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, max=128, help="Sequences in a batch; repeatable. 1, 16 and 64."),
    ] = None,
    rounds: Rounds = 5,
    breakdown: Annotated[
        bool, typer.Option("--breakdown", help="Only where the time of a step goes.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for results.json and results.png.")] = Path(
        "build/bench"
    ),
) -> None:
    """Time stock vLLM, the plugin, one plan, mixed plans and deleted layers, turn by turn.

    All in one process on one thread, with made-up weights, which cost the same as trained ones.
    """
    if context.invoked_subcommand is not None:
        return
    console = Console()
    with plain_errors(stopped="stopped; of models that were not done nothing is kept"):
        shapes = shapes_of(model)
        from vllm_adaskip.lab.bench.machine import Machine
        from vllm_adaskip.lab.bench.plot import draw
        from vllm_adaskip.lab.bench.results import Results
        from vllm_adaskip.lab.bench.suite import Suite

        batches = sorted({*(batch or (1, 16, 64))})
        out.mkdir(parents=True, exist_ok=True)
        with saying(console) as say:
            results = Results(Machine.measure())
            for shape in shapes:
                suite = Suite(shape, results, effort_for(shape, rounds), batches, say)
                with TemporaryDirectory() as folder:
                    suite.run(Path(folder), only_breakdown=breakdown)
                results.write(out / "results.json")  # so that a later shape cannot lose it
                draw(results, out / "results.png")
    print_results(console, results)
    console.print(f"Written: {out / 'results.json'}, {out / 'results.png'}")


def shapes_of(names: list[str] | None, *, kv_space: int = 1) -> list[Shape]:
    """Give the shapes that a user names, and set the environment for engines of this process.

    Call it before torch is loaded, which reads the number of threads then.
    """
    from vllm_adaskip.lab.bench.engines import alone
    from vllm_adaskip.lab.bench.shapes import Shape

    alone(kv_space)
    return [Shape.of(name) for name in names or ["bundled", "llama-3.2-1b"]]


def effort_for(shape: Shape, rounds: int) -> Effort:
    """Give many short steps of a small model, few long ones of a large one."""
    from vllm_adaskip.lab.bench.variants import Effort
    from vllm_adaskip.lab.bench.work import decoder_shape

    weighed = decoder_shape(shape)
    if weighed.num_layers * weighed.layer_parameters > _LARGE:
        return Effort(steps=3, rounds=rounds, turns=2, prompts=4)
    return Effort(steps=16, rounds=2 * rounds + 1, turns=3, prompts=16)


@contextmanager
def saying(console: Console) -> Iterator[Say]:
    """Show a bar for each piece of work."""
    with Progress(*COLUMNS, console=console) as progress:

        def say(what: str, total: int) -> Callable[[], None]:
            task = progress.add_task(what, total=total)
            return lambda: progress.advance(task)

        yield say


def print_results(console: Console, results: Results) -> None:
    """Print every variant, where time goes, and what was promised."""
    machine = results.machine
    console.print(
        f"This machine, one thread: {machine.bandwidth / 1e9:.1f} GB/s, "
        f"{machine.rate / 1e9:.0f} billion operations/s in bfloat16.\n"
        "Medians with quartiles over the rounds. A ratio above 1 is faster than stock vLLM; the "
        "roofline is the share of a step that the machine would need at least."
    )
    if results.timings:
        console.print(_timings(results))
    console.print(_breakdowns(results), _targets(results))


def _timings(results: Results) -> Table:
    columns = "case", "variant", "a step", "against stock vLLM", "roofline"
    table = Table("model", *columns, box=SIMPLE_HEAD, title="Steps")
    last = ""
    for one in results.timings:
        if last and last != one.case:
            table.add_section()
        last = one.case
        roof = "" if one.roofline is None else f"{one.roofline / one.seconds.middle:.0%}"
        step = f"{one.seconds.middle * 1e3:.2f} ms"
        table.add_row(one.model, one.case, one.variant, step, str(one.against_stock), roof)
    return table


def _breakdowns(results: Results) -> Table:
    """One column a case, as parts of a step are what is compared."""
    cases = [(model, case) for model, found in results.breakdowns.items() for case in found]
    table = Table("part of a step", box=SIMPLE_HEAD, title="Where the time goes")
    for model, case in cases:
        table.add_column(f"{model}, {case}")
    parts = list(dict.fromkeys(part for one in cases for part in _spent(results, *one)))
    for part in parts:
        cells = []
        for one in cases:
            spent = _spent(results, *one)
            cells.append(f"{spent[part] * 1e6:.0f} us, {spent[part] / sum(spent.values()):.1%}")
        table.add_row(part, *cells)
    return table


def _spent(results: Results, model: str, case: str) -> dict[str, float]:
    return results.breakdowns[model][case]


def _targets(results: Results) -> Table:
    table = Table("model", "what", "wanted", "found", "", box=SIMPLE_HEAD, title="Targets")
    for target in results.targets:
        wanted = f"{'<' if target.is_most else '>='} {target.wanted:g}"
        word = "met" if target.is_met else "[red]missed[/]"
        table.add_row(target.model, target.name, wanted, str(target.found), word)
    return table
