# SPDX-License-Identifier: Apache-2.0
"""``adaskip bench server``: a running server's throughput and latencies, plan by plan."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vllm_adaskip.cli.bench import Rounds, saying
from vllm_adaskip.cli.run import plain_errors


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
