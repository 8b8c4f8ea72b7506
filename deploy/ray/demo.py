# SPDX-License-Identifier: Apache-2.0
"""``make ray-demo``: the app of serve.yaml on this machine, plan affinity off and on in turns.

``python -m deploy.ray.demo '[3, 4]' '[5, 6]'`` asks for these plans.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice, product
from logging import WARNING, getLogger
from operator import truediv
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
import yaml
from ray.serve.request_router import PendingRequest, RunningReplica
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from deploy.ray.router import AffinityRouter
from vllm_adaskip.classifiers import SkipPlan
from vllm_adaskip.cli.demo import Entries
from vllm_adaskip.cli.run import parsed, plain_errors
from vllm_adaskip.lab.testbed.tasks import TASKS, Sample, samples

CONFIG = Path(__file__).with_name("serve.yaml")
#: Plans that are dealt out in turn unless others are named; the first is dense.
PLANS: list[Entries] = [
    [],
    [5, 6],
    [5, 6, "attn:7"],
    ["attn:8", "attn:9", "attn:10", "attn:11"],
    ["mlp:4", "mlp:5", "mlp:6"],
    [3, 4, 5, 6, 7, 8],
]
#: Questions of each task, how many requests are under way at once, and tokens of each answer.
PER_TASK, AT_ONCE, TOKENS = 40, 48, 48
#: Affinity is off and on so often, in turns.
ROUNDS = 3
SIDES = ("off", "on")


class Switch(AffinityRouter):
    """Affinity for requests whose ``user`` is ``on``; others go as Ray Serve sends them.

    So both have the same engines, which have been up for as long.
    """

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return the plan's replica first, or two at random, of which the less loaded is taken."""
        if pending_request is None or pending_request.args[0].user == "on":
            return await super().choose_replicas(candidate_replicas, pending_request)
        pending_request.routing_context.should_backoff = True
        return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]


@dataclass(frozen=True)
class Answer:
    """What came back for one request."""

    right: bool
    tokens: int


@dataclass(frozen=True)
class Round:
    """A load under one of `SIDES`: `reports` before and after it, and what came back."""

    side: str
    before: list[dict[str, Any]]
    answers: list[Answer]
    seconds: float
    after: list[dict[str, Any]]

    @property
    def tokens(self) -> int:
        """Tokens of all answers."""
        return sum(answer.tokens for answer in self.answers)

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


def main(
    plan: Annotated[
        list[str] | None, typer.Argument(help="Plans as JSON, [5, 6]; six of the demo's own.")
    ] = None,
) -> None:
    """Bring the app up, ask with affinity off and on in turns, print, and shut everything down."""
    with plain_errors():
        plans = [parsed(text, "plan", list) for text in plan or ()] or PLANS
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from deploy.ray.app_args import AppArgs
    from deploy.ray.report import reports
    from deploy.ray.serve import application

    console = Console()
    config = yaml.safe_load(CONFIG.read_text())
    written, http = config["applications"][0], config["http_options"]
    # No more replicas in the middle: the tables are about those there were from the start.
    args = written["args"] | {"max_replicas": written["args"]["min_replicas"]}
    # Each side gets the same prompts, so the second would find what the first has read.
    args["engine_kwargs"] = args["engine_kwargs"] | {"enable_prefix_caching": False}
    llm = AppArgs.model_validate(args).llm_config()
    router = RequestRouterConfig(request_router_class="deploy.ray.demo.Switch")
    llm.deployment_config["request_router_config"] = router
    for logger in ("ray.serve", "httpx"):
        getLogger(logger).setLevel(WARNING)
    cores = max(os.cpu_count() or 1, args["min_replicas"])
    ray.init("local", num_cpus=cores, log_to_driver=False, logging_level="error")
    rounds: list[Round] = []
    try:
        start = time.perf_counter()
        serve.start(http_options=http)
        serve.run(application(llm), name=written["name"])
        console.print(f"up after {time.perf_counter() - start:.0f} s: {len(reports())} replicas")
        url = f"http://{http['host']}:{http['port']}/v1/completions"
        questions = [one for task in TASKS for one in samples(task, "test", 1, PER_TASK)]
        load = list(zip(islice(cycle(plans), len(questions)), questions, strict=True))
        asyncio.run(ask(url, args["name"], load[:AT_ONCE], SIDES[0]))  # warms up
        for _, side in product(range(ROUNDS), SIDES):
            before, start = reports(), time.perf_counter()
            answers = asyncio.run(ask(url, args["name"], load, side))
            rounds.append(Round(side, before, answers, time.perf_counter() - start, reports()))
    finally:
        ray.shutdown()
    for side in SIDES:
        mine = [one for one in rounds if one.side == side]
        console.print(replicas_table(side, mine))
        console.print(plans_table(side, mine, plans))
    console.print(speeds_table(rounds))


async def ask(url: str, name: str, load: list[tuple[Entries, Sample]], side: str) -> list[Answer]:
    """Send the load, so many requests at once; any answer but 200 is an error."""
    gate = asyncio.Semaphore(AT_ONCE)
    limits = httpx.Limits(max_connections=AT_ONCE)
    common = {"model": name, "temperature": 0, "user": side}
    # Questions of the tasks have answers of a few words, so engines are told to go on.
    common |= {"max_tokens": TOKENS, "ignore_eos": True}
    async with httpx.AsyncClient(timeout=120, limits=limits) as client:

        async def one(plan: Entries, question: Sample) -> Answer:
            body = {**common, "prompt": question.prompt, "vllm_xargs": {"adaskip_skip": plan}}
            async with gate:
                reply = await client.post(url, json=body)
            facts = reply.raise_for_status().json()
            words, wanted = facts["choices"][0]["text"].split(), question.answer.split()
            right = words[: len(wanted)] == wanted
            return Answer(right, facts["usage"]["completion_tokens"])

        return list(await asyncio.gather(*(one(*pair) for pair in load)))


def counted(rounds: list[Round], count: Callable[[dict[str, Any]], int]) -> list[int]:
    """Return what each replica has counted during the rounds."""
    return [
        sum(count(one.after[place]) - count(one.before[place]) for one in rounds)
        for place in range(len(rounds[0].after))
    ]


def replicas_table(side: str, rounds: list[Round]) -> Table:
    """Show what each replica's worker counted."""
    columns = "replica", "requests", "decode tokens", "attention run", "MLPs run"
    table = Table(*columns, title=f"affinity {side}: each replica", box=SIMPLE_HEAD)
    depth = rounds[0].after[0]["workers"][0]["num_layers"]
    tokens = counted(rounds, lambda one: int(one["workers"][0]["decode_tokens"]))
    requests = counted(rounds, lambda one: int(one["workers"][0]["requests"]))
    ran = [
        counted(rounds, lambda one, key=key: sum(one["workers"][0][key]))  # type: ignore[misc]
        for key in ("attn_run", "mlp_run")
    ]
    for place, replica in enumerate(rounds[0].after):
        most = max(1, tokens[place] * depth)
        shares = (f"{each[place] / most:.0%}" for each in ran)
        table.add_row(replica["replica"], str(requests[place]), str(tokens[place]), *shares)
    return table


def plans_table(side: str, rounds: list[Round], plans: list[Entries]) -> Table:
    """Show which replica was asked for which plan, and how many of its answers were right."""
    replicas = [one["replica"] for one in rounds[0].after]
    table = Table("plan", *replicas, "right", box=SIMPLE_HEAD)
    table.title = f"affinity {side}: requests by plan"
    depth = rounds[0].after[0]["workers"][0]["num_layers"]
    for place, plan in enumerate(plans):
        kind = json.dumps({"adaskip_skip": plan})
        asked = counted(rounds, lambda one, kind=kind: int(one["asked"].get(kind, 0)))  # type: ignore[misc]
        mine = [answer.right for one in rounds for answer in one.answers[place :: len(plans)]]
        share = f"{sum(mine) / len(mine):.0%}"
        table.add_row(str(SkipPlan.parse(plan, depth)), *map(str, asked), share)
    return table


def speeds_table(rounds: list[Round]) -> Table:
    """Show how fast both sides were, round by round."""
    table = Table("tokens a second", *SIDES, "on / off", box=SIMPLE_HEAD)
    table.title = f"{len(rounds[0].answers)} requests a round, {AT_ONCE} at once"
    pairs = list(zip(rounds[::2], rounds[1::2], strict=True))
    for number, (off, on) in enumerate(pairs, start=1):
        table.add_row(f"round {number}", *_row(off.speed, on.speed))
    tokens, seconds = (
        [sum(getattr(one, fact) for one in side) for side in zip(*pairs, strict=True)]
        for fact in ("tokens", "seconds")
    )
    table.add_row("all", *_row(*map(truediv, tokens, seconds)))
    return table


def _row(off: float, on: float) -> tuple[str, str, str]:
    return f"{off:.0f}", f"{on:.0f}", f"{on / off:.2f}"


if __name__ == "__main__":
    typer.run(main)
