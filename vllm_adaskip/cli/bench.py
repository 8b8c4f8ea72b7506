# SPDX-License-Identifier: Apache-2.0
"""``adaskip bench``: what skipping is worth on the clock, on this machine."""

from __future__ import annotations

from collections.abc import Callable
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
    from vllm_adaskip.bench.results import Results
    from vllm_adaskip.bench.shapes import Shape

COLUMNS = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
#: Parameters above which a step takes so long that few of them tell enough.
_LARGE = 1e8

bench = typer.Typer(help="Time skipping beside stock vLLM.", invoke_without_command=True)


@bench.callback()
def table(
    context: typer.Context,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="bundled, llama-3.2-1b, tinyllama-1.1b, opt-1.3b, or a model's folder. May come "
            "several times; bundled and llama-3.2-1b if left out."
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, max=128, help="Sequences in a batch; 1, 16 and 64 if left out."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Turns that each variant takes.")] = 7,
    out: Annotated[Path, typer.Option(help="Folder for results.json and results.png.")] = Path(
        "bench"
    ),
) -> None:
    """Time stock vLLM, the plugin, one plan, mixed plans and deleted layers, turn by turn."""
    if context.invoked_subcommand is not None:
        return
    console = Console()
    with plain_errors():
        from vllm_adaskip.bench.engines import alone
        from vllm_adaskip.bench.shapes import Shape

        alone()
        shapes = [Shape.of(name) for name in model or ["bundled", "llama-3.2-1b"]]
        out.mkdir(parents=True, exist_ok=True)
        results = _run(console, shapes, sorted({*(batch or (1, 16, 64))}), rounds, out)
    print_results(console, results)
    console.print(f"Written: {out / 'results.json'}, {out / 'results.png'}")


def _run(
    console: Console, shapes: list[Shape], batches: list[int], rounds: int, out: Path
) -> Results:
    from vllm_adaskip.bench.machine import Machine
    from vllm_adaskip.bench.plot import draw
    from vllm_adaskip.bench.results import Results
    from vllm_adaskip.bench.suite import Effort, Suite
    from vllm_adaskip.bench.work import decoder_shape

    with Progress(*COLUMNS, console=console) as progress:

        def say(what: str, total: int) -> Callable[[], None]:
            task = progress.add_task(what, total=total)
            return lambda: progress.advance(task)

        results = Results(Machine.measure())
        for shape in shapes:
            weighed = decoder_shape(shape)
            is_large = weighed.num_layers * weighed.layer_parameters > _LARGE
            effort = Effort(3, rounds, 4) if is_large else Effort(16, 2 * rounds + 1, 16)
            with TemporaryDirectory() as folder:
                Suite(shape, results, effort, batches, say).run(Path(folder))
            results.write(out / "results.json")  # so that a later shape cannot lose it
            draw(results, out / "results.png")
    return results


def print_results(console: Console, results: Results) -> None:
    """Print every variant, where time goes, and what was promised."""
    machine = results.machine
    console.print(
        f"This machine, one thread: {machine.bandwidth / 1e9:.1f} GB/s, "
        f"{machine.rate / 1e9:.0f} billion operations/s in bfloat16.\n"
        "Medians with quartiles over the rounds; a ratio above 1 is faster than stock vLLM."
    )
    columns = "model", "case", "variant", "a step", "against stock vLLM", "roofline"
    timings = Table(*columns, box=SIMPLE_HEAD, title="Steps")
    for one in results.timings:
        roof = "" if one.roofline is None else f"{one.roofline / one.seconds.middle:.0%}"
        step = f"{one.seconds.middle * 1e3:.2f} ms"
        timings.add_row(one.model, one.case, one.variant, step, str(one.against_stock), roof)
    parts = Table("model", "case", "part", "a step", "share", box=SIMPLE_HEAD, title="Breakdown")
    for model, cases in results.breakdowns.items():
        for case, spent in cases.items():
            whole = sum(spent.values())
            for part, seconds in spent.items():
                parts.add_row(
                    model, case, part, f"{seconds * 1e6:.0f} us", f"{seconds / whole:.1%}"
                )
            parts.add_section()
    targets = Table("model", "what", "wanted", "found", "", box=SIMPLE_HEAD, title="Targets")
    for target in results.targets:
        sign, word = ("<", "met") if target.is_most else (">=", "met")
        if not target.is_met:
            word = "[red]missed[/]"
        found = str(target.found)
        targets.add_row(target.model, target.name, f"{sign} {target.wanted:g}", found, word)
    console.print(timings, parts, targets)
