# SPDX-License-Identifier: Apache-2.0
"""``adaskip bench``: what skipping is worth on the clock, on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from vllm_adaskip.cli.run import COLUMNS, plain_errors

if TYPE_CHECKING:
    from vllm_adaskip.lab.bench.results import Results
    from vllm_adaskip.lab.bench.shapes import Shape
    from vllm_adaskip.lab.bench.variants import Effort, Say

#: Parameters above which a step takes so long that few of them tell enough.
_LARGE = 5e8
#: What is timed where no model is named.
SHAPES_BY_DEFAULT = ("bundled", "smollm2-135m", "llama-400m", "llama-3.2-1b")

Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        help="bundled, smollm2-135m, llama-400m, llama-3.2-1b, llama-3.1-8b, tinyllama-1.1b, "
        "opt-1.3b, smollm2, or a folder with a config; repeatable. If left out: the first four.",
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
    adapters: Annotated[
        int, typer.Option(min=0, max=32, help="LoRA adapters that the requests take in turn.")
    ] = 0,
    breakdown: Annotated[
        bool, typer.Option("--breakdown", help="Only where the time of a step goes.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for results.json and results.png.")] = Path(
        "build/bench"
    ),
) -> None:
    """Time stock vLLM, the plugin, one plan, mixed plans and deleted layers, turn by turn.

    All compiled, as vLLM is by default, and stock vLLM eager too. In one process on one thread,
    with made-up weights, which cost the same as trained ones.
    """
    if context.invoked_subcommand is not None:
        return
    console = Console()
    with plain_errors(stopped="stopped; of models that were not done nothing is kept"):
        shapes = [replace(shape, adapters=adapters) for shape in shapes_of(model)]
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
                written = [out / "results.json"]
                if results.timings:  # none with --breakdown
                    draw(results, out / "results.png")
                    written.append(out / "results.png")
    print_results(console, results)
    console.print("Written:", ", ".join(map(str, written)))


def shapes_of(names: list[str] | None, *, kv_space: int = 1) -> list[Shape]:
    """Return the shapes that a user names, and set the environment for engines of this process.

    Call it before torch is loaded, which reads the number of threads then.
    """
    from vllm_adaskip.lab.bench.engines import alone
    from vllm_adaskip.lab.bench.shapes import Shape

    alone(kv_space)
    return [Shape.of(name) for name in names or [*SHAPES_BY_DEFAULT]]


def effort_for(shape: Shape, rounds: int) -> Effort:
    """Return many short steps of a small model, few long ones of a large one or with adapters."""
    from vllm_adaskip.lab.bench.variants import Effort
    from vllm_adaskip.lab.bench.work import decoder_shape

    weighed = decoder_shape(shape)
    if shape.adapters or weighed.num_layers * weighed.layer_parameters > _LARGE:
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


def curves() -> None:
    """Time the host's work of planning a step, which is done whenever the batch changes."""
    from vllm_adaskip.lab.bench.curves import curves as measure

    title = "planning a step: 32 layers, 256 sequences, 64 distinct plans, but for what grows"
    table = Table("what grows", "to", "time", "fitted power", box=SIMPLE_HEAD, title=title)
    for curve in measure():
        for size, seconds in curve.seconds.items():
            table.add_row(curve.what, str(size), f"{seconds * 1e3:.2f} ms", f"{curve.exponent:.2f}")
        table.add_section()
    Console().print(table)


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


def server(
    url: Annotated[str, typer.Option(help="Of a server with --plugin adaskip.")] = (
        "http://127.0.0.1:8000"
    ),
    skip: Annotated[
        list[str] | None,
        typer.Option(
            help="A plan as adaskip_skip has it, such as '[5, 6, \"attn:7\"]'; repeatable. Timed "
            "one by one, and all together in one batch."
        ),
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=1024, help="Requests at a time.")] = 16,
    prompt: Annotated[int, typer.Option(min=1, max=65536, help="Tokens of a prompt.")] = 64,
    tokens: Annotated[int, typer.Option(min=2, max=65536, help="Tokens of an answer.")] = 64,
    rounds: Rounds = 5,
) -> None:
    """Send batches of requests: dense, and under each plan, turn by turn."""
    console = Console()
    with plain_errors(stopped="stopped; nothing is kept"):
        from vllm_adaskip.lab.bench.rounds import Spread
        from vllm_adaskip.lab.bench.server import Arguments, Load, Server, compare

        plans = [{"adaskip_skip": _plan(one)} for one in skip or ["[3, 4, 5]"]]
        variants: dict[str, Arguments] = {"dense": [{"adaskip": "off"}] * concurrency}
        variants |= {f"skip {one['adaskip_skip']}": [one] * concurrency for one in plans}
        if len(plans) > 1:
            dealt = [plans[turn % len(plans)] for turn in range(concurrency)]
            variants[f"{len(plans)} plans mixed"] = dealt
        with saying(console) as say:
            load = Load(prompt, tokens)
            done = say("batches", len(variants) * (rounds + 1))
            found = compare(Server(url), load, variants, rounds, done)
    columns = "tokens/s", "against dense", "first token", "per token"
    table = Table("requests", *columns, box=SIMPLE_HEAD, title=f"{concurrency} at a time")
    dense = found["dense"]
    for name, served in found.items():
        ratios = [a.throughput / b.throughput for a, b in zip(served, dense, strict=True)]
        middle = (
            Spread.of([getattr(one, part) for one in served]).middle
            for part in ("throughput", "first_token", "per_token")
        )
        throughput, first, each = middle
        times = f"{first * 1e3:.0f} ms", f"{each * 1e3:.1f} ms"
        table.add_row(name, f"{throughput:.0f}", str(Spread.of(ratios)), *times)
    console.print(table)


def _plan(text: str) -> list[object]:
    try:
        plan = json.loads(text)
    except ValueError:
        plan = None
    if not isinstance(plan, list):
        raise ValueError(f"--skip {text!r:.80} is no plan; allowed: a JSON list such as [5, 6]")
    return plan
