# SPDX-License-Identifier: Apache-2.0
"""``make ray-demo``: the app of serve.yaml on this machine, under a mixed load."""

from __future__ import annotations

import asyncio
import json
import os
import time
from dataclasses import dataclass
from itertools import cycle, islice
from logging import WARNING, getLogger
from pathlib import Path
from typing import Any

import httpx
import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vllm_adaskip.classifiers import SkipPlan
from vllm_adaskip.cli.demo import Entries
from vllm_adaskip.lab.testbed.tasks import TASKS, Sample, samples

CONFIG = Path(__file__).with_name("serve.yaml")
#: Plans that are dealt out in turn; the first is dense.
PLANS: list[Entries] = [
    [],
    [5, 6],
    [5, 6, "attn:7"],
    ["attn:8", "attn:9", "attn:10", "attn:11"],
    ["mlp:4", "mlp:5", "mlp:6"],
    [3, 4, 5, 6, 7, 8],
]
#: Questions of each task, and how many requests are under way at once.
PER_TASK, AT_ONCE = 40, 48


@dataclass(frozen=True)
class Answer:
    """What came back for one request."""

    right: bool
    tokens: int


def main() -> None:
    """Bring the app up, ask, print, and shut everything down."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray import serve

    from deploy.ray.report import reports
    from deploy.ray.serve import app

    console = Console()
    config = yaml.safe_load(CONFIG.read_text())
    application, http = config["applications"][0], config["http_options"]
    # No more replicas in the middle: the tables are about those there were from the start.
    args = application["args"] | {"max_replicas": application["args"]["min_replicas"]}
    name = args["name"]
    getLogger("ray.serve").setLevel(WARNING)
    cores = max(os.cpu_count() or 1, args["min_replicas"])
    ray.init("local", num_cpus=cores, log_to_driver=False, logging_level="error")
    try:
        start = time.perf_counter()
        serve.start(http_options=http)
        serve.run(app(args), name=application["name"])
        console.print(f"up after {time.perf_counter() - start:.0f} s: {len(reports())} replicas")
        url = f"http://{http['host']}:{http['port']}/v1/completions"
        questions = [one for task in TASKS for one in samples(task, "test", 1, PER_TASK)]
        load = list(zip(islice(cycle(PLANS), len(questions)), questions, strict=True))
        asyncio.run(ask(url, name, load[:AT_ONCE]))  # warms up
        before = reports()
        start = time.perf_counter()
        answers = asyncio.run(ask(url, name, load))
        seconds = time.perf_counter() - start
        after = reports()
    finally:
        ray.shutdown()
    console.print(replicas_table(before, after, seconds))
    console.print(plans_table(before, after, load, answers))
    tokens = sum(answer.tokens for answer in answers)
    console.print(
        f"{len(answers)} requests, {AT_ONCE} at once, in {seconds:.1f} s: "
        f"{len(answers) / seconds:.0f} requests and {tokens / seconds:.0f} tokens a second"
    )


async def ask(url: str, name: str, load: list[tuple[Entries, Sample]]) -> list[Answer]:
    """Send the load, so many requests at once; any answer but 200 is an error."""
    gate = asyncio.Semaphore(AT_ONCE)
    limits = httpx.Limits(max_connections=AT_ONCE)
    async with httpx.AsyncClient(timeout=120, limits=limits) as client:

        async def one(plan: Entries, question: Sample) -> Answer:
            body = {"model": name, "prompt": question.prompt, "temperature": 0, "max_tokens": 24}
            async with gate:
                reply = await client.post(url, json={**body, "vllm_xargs": {"adaskip_skip": plan}})
            facts = reply.raise_for_status().json()
            text = facts["choices"][0]["text"].strip()
            return Answer(text == question.answer, facts["usage"]["completion_tokens"])

        return list(await asyncio.gather(*(one(*pair) for pair in load)))


def replicas_table(
    before: list[dict[str, Any]], after: list[dict[str, Any]], seconds: float
) -> Table:
    """Show what each replica's worker counted meanwhile."""
    table = Table(
        *("replica", "requests", "decode tokens", "a second"),
        *("attention run", "MLPs run"),
        title="each replica",
        box=SIMPLE_HEAD,
    )
    for old, new in zip(before, after, strict=True):
        (was,), (now,) = old["workers"], new["workers"]
        tokens = now["decode_tokens"] - was["decode_tokens"]
        most = max(1, tokens * now["num_layers"])
        table.add_row(
            new["replica"],
            str(now["requests"] - was["requests"]),
            str(tokens),
            f"{tokens / seconds:.0f}",
            *(f"{(sum(now[key]) - sum(was[key])) / most:.0%}" for key in ("attn_run", "mlp_run")),
        )
    return table


def plans_table(
    before: list[dict[str, Any]],
    after: list[dict[str, Any]],
    load: list[tuple[Entries, Sample]],
    answers: list[Answer],
) -> Table:
    """Show who was asked for which plan, and how many answers under it were right."""
    table = Table("plan", *(one["replica"] for one in after), "right", box=SIMPLE_HEAD)
    table.title = "requests by plan"
    for plan in PLANS:
        kind = json.dumps({"adaskip_skip": plan})
        mine = [a.right for (entries, _), a in zip(load, answers, strict=True) if entries == plan]
        asked = [
            str(new["asked"].get(kind, 0) - old["asked"].get(kind, 0))
            for old, new in zip(before, after, strict=True)
        ]
        depth = after[0]["workers"][0]["num_layers"]
        share = f"{sum(mine) / len(mine):.0%}"
        table.add_row(str(SkipPlan.parse(plan, depth)), *asked, share)
    return table


if __name__ == "__main__":
    main()
