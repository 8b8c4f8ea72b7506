# SPDX-License-Identifier: Apache-2.0
"""``adaskip bench load``: a server from idle to beyond saturation, dense, with plans, and busy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vllm_adaskip.cli import run
from vllm_adaskip.cli.bench import saying

if TYPE_CHECKING:
    from vllm_adaskip.lab.bench.load import Objective, Point


def load(
    rate: Annotated[
        list[float], typer.Option(min=0.01, help="Requests a second, in the mean; repeatable.")
    ],
    url: Annotated[str, typer.Option(help="Of a server with --plugin adaskip.")] = (
        "http://127.0.0.1:8000"
    ),
    model: Annotated[
        str, typer.Option(help="Of which the server is; the bundled model if left out.")
    ] = "",
    max_compute: Annotated[
        float, typer.Option(min=0.01, max=1, help="Of the requests that always follow a plan.")
    ] = 1.0,
    prompt_exit: Annotated[
        int, typer.Option(min=0, help="Layers that their prompts run; 0: all.")
    ] = 0,
    data: run.Questions = "",
    columns: run.Columns = "",
    apply_chat_template: run.ApplyChatTemplate = False,
    limit: Annotated[int, typer.Option(min=1, help="Questions of each task.")] = 200,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 64,
    seconds: Annotated[float, typer.Option(min=1, help="For which requests arrive.")] = 60,
    first_token: Annotated[
        float, typer.Option(min=1, help="Milliseconds to the first token, to count as good.")
    ] = 1000,
    per_token: Annotated[
        float, typer.Option(min=0.1, help="Milliseconds a token after it, to count as good.")
    ] = 100,
    seed: run.Seed = 0,
    out: Annotated[Path, typer.Option(help="Folder for load.json and load.png.")] = Path(
        "build/load"
    ),
) -> None:
    """Send questions at each rate, Poisson: dense, always under a plan, and as the server decides.

    The last is what a server's option `busy` is for (docs/load.md).
    """
    console = Console()
    with run.plain_errors(stopped="stopped; what vllm bench serve said so far is kept"):
        from vllm_adaskip.lab.bench.load import Asked, Objective, draw, measure
        from vllm_adaskip.lab.bench.server import Server
        from vllm_adaskip.lab.models import model_path

        server, path = Server(url), model_path(model)
        items, _ = run.questions(path, data, limit, seed, columns, apply_chat_template)
        out.mkdir(parents=True, exist_ok=True)
        prompts = out / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": one.prompt}) + "\n" for one in items))
        always: dict[str, Any] = {"adaskip_max_compute": max_compute}
        if prompt_exit:
            always["adaskip_prompt_exit"] = prompt_exit
        variants = {"dense": {"adaskip": "off"}, "always": always, "as served": None}
        objective = Objective(first_token, per_token)
        asked = Asked(server.url, server.model, path, prompts, tokens, seconds, objective)
        with saying(console) as say:
            done = say("rates", len(rate) * len(variants))
            found = measure(asked, variants, sorted({*rate}), out, done)
        (out / "load.json").write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")
        draw(found, objective, out / "load.png")
    _show(console, found, objective)
    console.print(f"Written: {out / 'load.json'}, load.png, and an answer file for each row")


def _show(console: Console, found: Sequence[Point], objective: Objective) -> None:
    """Print a row for each rate and variant, narrow enough for a terminal of 80 columns."""
    title = (
        f"Requests/s; good: first token within {objective.first_token:g} ms, "
        f"{objective.per_token:g} ms a token after it. Times: median / 95 %."
    )
    has_levels = any(one.levels for one in found)
    names = ["sent", "requests", "good", "answered", "first token, ms", "a token, ms", "ran"]
    columns = [*names, "shortened", *["levels"] * has_levels]
    table = Table(*columns, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title)
    for one in sorted(found, key=lambda each: each.rate):
        late = [f"{part[0]:.0f} / {part[1]:.0f}" for part in (one.first_token, one.per_token)]
        levels = ["/".join(map(str, one.levels))] * has_levels
        table.add_row(
            f"{one.rate:g}", one.variant, f"{one.good:.2f}", f"{one.served:.2f}",
            *late, f"{one.ran:.0%}", f"{one.shortened:.0%}", *levels,
        )  # fmt: skip
    console.print(table)
    console.print(
        "ran: sub-layers that generated tokens ran; shortened: prompts' tokens under a prompt plan."
    )
    if failed := sum(one.failed for one in found):
        console.print(f"{failed} requests failed; vllm bench serve's files say which.")
