# SPDX-License-Identifier: Apache-2.0
"""The torture test for as long as one likes, on engines in processes of their own.

One engine after another, one for each way to fill K/V, gets an equal share of the time and
traffic from fresh seeds; all that it finishes is judged, as in `test_torture.py`. Beside
that the resident sets of the engine's processes are watched. Ctrl-C ends the run after the
few examples at hand and prints what there is.

    python tests/torture/soak.py --minutes 30
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Annotated

os.environ.update(  # before vLLM and torch are imported
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_LOGGING_LEVEL="ERROR",
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
)
sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil
import typer
from hypothesis import seed as seeded
from hypothesis.stateful import run_state_machine_as_test
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from torture.engines import ENGINES, MAX_MODEL_LEN, engine_options, write_model
from torture.judge import Judge
from torture.machine import examples, machine, words
from torture.traffic import Request, Tally, Traffic
from vllm import LLM

#: Requests after which memory is expected to be flat; until then caches of kernels grow.
WARM_UP = 600
#: Examples between two looks at the clock, and rules in one of them.
EXAMPLES, RULES = 6, 40


@dataclass
class Run:
    """What the soak knows of one engine."""

    kv_fill: str
    seconds: float = 0.0
    tally: Tally = field(default_factory=Tally)
    live_rows: int = 0
    #: When (start, warm, end) -> process of the engine -> its resident set in bytes.
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def look(self, traffic: Traffic) -> None:
        """Note where the engine stands, between two examples."""
        self.tally, self.failures = traffic.tally, traffic.faults
        self.live_rows = traffic.report()["live_rows"]
        now = {
            process.name().removeprefix("VLLM::"): process.memory_info().rss
            for process in psutil.Process().children(recursive=True)
            if process.name().startswith("VLLM::")
        }
        self.memory.setdefault("start", now)
        if self.tally.finished >= WARM_UP:
            self.memory.setdefault("warm", now)
        self.memory["end"] = now


def main(
    minutes: Annotated[float, typer.Option(min=0.1, help="Time for all engines.")] = 30,
    seed: Annotated[int | None, typer.Option(help="Of the traffic; fresh if left out.")] = None,
) -> None:
    """Torture the engines, and exit with 1 unless every output was right."""
    seeds = random.Random(seed := random.randrange(2**32) if seed is None else seed)
    console, runs = Console(), [Run(kv_fill) for kv_fill in ENGINES]
    console.print(f"seed {seed}")
    stopping: list[int] = []
    # The engines' processes inherit the mask, so Ctrl-C reaches this one alone; the tracker
    # is started first, because its start would lift the mask.
    resource_tracker.ensure_running()
    signal.signal(signal.SIGINT, lambda number, frame: stopping.append(number))
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder))
        share = minutes * 60 / len(runs)
        columns = TextColumn("{task.description}"), BarColumn(20), TimeElapsedColumn()
        with Progress(*columns, console=console) as progress:
            for run in runs:
                task = progress.add_task(f"{run.kv_fill}: starting", total=share)

                def more(run: Run = run, task: TaskID = task) -> bool:
                    progress.update(task, completed=run.seconds, description=describe(run))
                    return not stopping and run.seconds < share

                if not stopping:
                    soak(run, model, seeds, more)
    for run in runs:
        for failure in run.failures:
            console.print(f"\nkv_fill {run.kv_fill}:\n{failure}", markup=False, soft_wrap=True)
    console.print(summary(runs))
    ran = [run for run in runs if run.seconds]
    bitten = all(run.tally.preemptions and run.tally.prefix_hit_tokens for run in ran)
    if not (ran and bitten) or any(run.failures or run.live_rows for run in runs):
        raise typer.Exit(1)


def soak(run: Run, model: str, seeds: random.Random, more: Callable[[], bool]) -> None:
    """Start one engine, torture it while there is ``more``, shut it down."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    traffic = Traffic(LLM(model, **engine_options(run.kv_fill)), Judge(model))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    run.look(traffic)
    visit_every_size(traffic, ENGINES[run.kv_fill]["max_num_batched_tokens"])
    start = time.monotonic()  # however long that took, the traffic has its time
    while more() and not traffic.broken:
        torture, known = seeded(seeds.randrange(2**32))(machine(traffic)), len(traffic.faults)
        try:
            run_state_machine_as_test(torture, settings=examples(EXAMPLES, RULES))
        except Exception as error:
            if len(traffic.faults) == known:  # else the fault itself says more
                traffic.faults.append(repr(error))
                break  # what is wrong is not the traffic, and would be so again
        if not traffic.broken:
            run.look(traffic)
        run.seconds = time.monotonic() - start
    traffic.llm.llm_engine.engine_core.shutdown()


def visit_every_size(traffic: Traffic, largest: int) -> None:
    """One dense prompt of each length alone: a step of each number of tokens.

    The worker keeps some memory for each size that it meets; that of stock vLLM does too.
    Chance would bring the last of them after many thousand requests, like a leak.
    """
    for length in range(1, min(largest, MAX_MODEL_LEN - 1) + 1):
        traffic.send(Request(words(1000 + length, length), [], max_tokens=1))
        while traffic.running:
            traffic.step()
    traffic.settle()


def describe(run: Run) -> str:
    """Where a run stands, in a line."""
    tally = run.tally
    return (
        f"{run.kv_fill}: {tally.finished} requests, {tally.preemptions} preemptions, "
        f"{tally.prefix_hit_tokens} prefix-hit tokens, {tally.mismatches} mismatches"
    )


def summary(runs: list[Run]) -> Table:
    """One column for each engine, and their total."""
    table = Table("", *(run.kv_fill for run in runs), "total", title="kv_fill")
    counts = [asdict(run.tally) for run in runs]
    for name, total in asdict(sum((run.tally for run in runs), Tally())).items():
        cells = [f"{count[name]:,}" for count in counts]
        table.add_row(name.replace("_", " "), *cells, f"{total:,}")
    rows, seconds = [run.live_rows for run in runs], [run.seconds for run in runs]
    table.add_row("live rows at end", *map(str, rows), str(sum(rows)))
    table.add_row("minutes", *(f"{one / 60:.1f}" for one in seconds), f"{sum(seconds) / 60:.1f}")
    for process in ("EngineCore", "Worker"):
        for when in ("start", "warm", "end"):
            cells = [_mebibytes(run.memory.get(when, {}).get(process)) for run in runs]
            table.add_row(f"{process} RSS, {when}", *cells)
        for since in ("start", "warm"):
            cells = [_growth(run.memory, since, process) for run in runs]
            table.add_row(f"{process} growth since {since}", *cells)
    table.caption = f"start: right after start; warm: after {WARM_UP} requests, of every size"
    return table


def _mebibytes(size: int | None) -> str:
    return "" if size is None else f"{size / (1 << 20):.1f} MiB"


def _growth(memory: dict[str, dict[str, int]], since: str, process: str) -> str:
    if process not in memory.get(since, {}):
        return ""
    return f"{memory['end'][process] / memory[since][process] - 1:+.2%}"


if __name__ == "__main__":
    typer.run(main)
