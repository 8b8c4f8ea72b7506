# SPDX-License-Identifier: Apache-2.0
"""What plan affinity is worth with more replicas than one machine has, by simulation.

Replicas with continuous batching, Poisson arrivals, plans drawn evenly. A step costs what was
measured (`measure`: one engine on this machine, rows and plans dealt evenly), or what a roofline
of a GPU says: the larger of bytes and operations,

    (weights of sub-layers that any row needs + K/V that rows read) / bytes per second
    operations of the rows' own sub-layers / operations per second

where a step that reads a prompt needs all weights, and the prompt's tokens run everything. The
roofline is a model: no launch overhead, nothing measured. Policies: two replicas drawn and the
less loaded taken, as Ray Serve does, and `deploy.ray.affinity`, the code that the router runs.

    python benchmarks/affinity.py measure benchmarks/affinity_costs.json
    python benchmarks/affinity.py simulate benchmarks/affinity_costs.json affinity.json
"""

from __future__ import annotations

import heapq
import json
import random
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import count, product
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from deploy.ray.affinity import Affinity
from vllm_adaskip.classifiers import SkipPlan
from vllm_adaskip.lab.bench.engines import alone, decode, engine, first_tokens, following
from vllm_adaskip.lab.bench.plans import deal, distinct
from vllm_adaskip.lab.bench.shapes import Shape
from vllm_adaskip.lab.bench.work import Work

#: NVIDIA's figures for an H100 SXM: bytes/s of its memory, dense bfloat16 operations/s.
H100 = 3.35e12, 989e12
#: Tokens of an answer in the mean; they have from half to one and a half of it, evenly.
ANSWER = 128
#: Of the prompt that `measure` times; a prompt of another length costs in proportion.
TOKENS = 256
#: Rows of a batch at most.
ROWS = 32
#: Seconds of a step: rows by number of plan, and how many prompts are read in it.
Cost = Callable[[Mapping[int, int], int], float]


@dataclass
class Replica:
    """One engine: a batch of sequences, and those that wait to enter it."""

    cost: Cost
    waiting: deque[tuple[float, int, int, int]] = field(default_factory=deque)
    rows: Counter[int] = field(default_factory=Counter)
    ends: list[tuple[int, float, int, int]] = field(default_factory=list)
    steps: int = 0
    running: bool = False

    @property
    def load(self) -> int:
        """Requests that are here."""
        return len(self.waiting) + len(self.ends)

    def step(self) -> float:
        """Let waiting requests in, and return what the step takes."""
        prompts = 0
        while self.waiting and len(self.ends) < ROWS:
            arrived, plan, tokens, name = self.waiting.popleft()
            heapq.heappush(self.ends, (self.steps + tokens, arrived, plan, name))
            self.rows[plan] += 1
            prompts += 1
        return self.cost(self.rows, prompts)

    def done(self) -> list[tuple[float, int]]:
        """End the step; return when the requests that are done now had arrived, and their names."""
        self.steps += 1
        found = []
        while self.ends and self.ends[0][0] <= self.steps:
            _, arrived, plan, name = heapq.heappop(self.ends)
            self.rows[plan] -= 1
            if not self.rows[plan]:
                del self.rows[plan]
            found.append((arrived, name))
        return found


def run(
    cost: Cost, replicas: int, plans: int, routers: int, requests: int, rate: float = 0
) -> tuple[float, list[float]]:
    """Return answers a second, and the seconds of each from arrival to its last token.

    Requests arrive at that rate; at 0 as many are under way as rows, a new one for each that ends.
    A fifth is warm-up, and left out. So many routers of ours share them; 0: they are spread evenly.
    """
    draw, chance = random.Random(1), random.Random(2)
    number, names = count(), count()
    engines = [Replica(cost) for _ in range(replicas)]
    affinities: list[Affinity[int]] = [Affinity() for _ in range(routers)]
    events: list[tuple[float, int, int]] = []  # when, and the replica whose step ends; -1: arrival
    left, taken = requests, []

    def arrive(at: float) -> None:
        nonlocal left
        if left:
            left -= 1
            heapq.heappush(events, (at, next(number), -1))

    for _ in range(1 if rate else ROWS * replicas):
        arrive(0)
    while events:
        now, _, place = heapq.heappop(events)
        if place < 0:
            plan, name = draw.randrange(plans), next(names)
            loads = {at: one.load for at, one in enumerate(engines)}
            if routers:
                place = affinities[name % routers].choose(f"plan {plan}", loads)
                affinities[name % routers].start(str(name), f"plan {plan}", place)
            else:
                place = min(chance.sample(list(loads), min(2, replicas)), key=loads.__getitem__)
            tokens = draw.randint(ANSWER // 2, ANSWER * 3 // 2)
            engines[place].waiting.append((now, plan, tokens, name))
            if rate:
                arrive(now + draw.expovariate(rate))
            if engines[place].running:
                continue
        else:
            for arrived, name in engines[place].done():
                if routers:
                    affinities[name % routers].end(str(name))
                taken.append((now, now - arrived))
                if not rate:
                    arrive(now)
        one = engines[place]
        one.running = one.load > 0
        if one.running:
            heapq.heappush(events, (now + one.step(), next(number), place))
    kept = taken[requests // 5 : -ROWS * replicas]  # in the end batches run empty
    return len(kept) / (kept[-1][0] - kept[0][0]), [seconds for _, seconds in kept]


def roofline(share: float, plans: int, prompt: int, gpu: tuple[float, float] = H100) -> Cost:
    """Return an 8B decoder's step on a GPU, under so many plans that leave out such a share."""
    shape = Shape.of("llama-3.1-8b")
    layers = shape.num_layers
    masks = distinct(layers, plans, share)
    context = prompt + ANSWER // 2
    each = [Work.of(shape, [plan], context) for plan in masks]
    whole = Work.of(shape, [SkipPlan(layers)], prompt // 2)

    @cache
    def weights(present: frozenset[int]) -> int:
        return Work.of(shape, [masks[one] for one in present], context).weight_bytes

    def cost(rows: Mapping[int, int], prompts: int) -> float:
        read = whole.weight_bytes if prompts and prompt else weights(frozenset(rows))
        read += sum(number * each[plan].kv_bytes for plan, number in rows.items())
        operations = sum(number * each[plan].operations for plan, number in rows.items())
        operations += prompts * prompt * whole.operations
        return max(read / gpu[0], operations / gpu[1])

    return cost


def measured(costs: Mapping[str, Any], prompt: int) -> Cost:
    """Return a measured step, between what was measured by straight lines."""
    columns = np.array(costs["steps"]).T

    @cache
    def at(number: int, kinds: int) -> float:
        across = [np.interp(number, costs["rows"], column) for column in columns]
        return float(np.interp(kinds, costs["plans"], across))

    def cost(batch: Mapping[int, int], prompts: int) -> float:
        return at(sum(batch.values()), len(batch)) + prompts * prompt * float(costs["token"])

    return cost


@dataclass(frozen=True)
class Found:
    """One row of the table: answers a second with full batches, and p99 seconds at 0.8 of `even`'s.

    The latter are of Poisson arrivals; for the former a new request comes for each that ends.
    """

    costs: str
    replicas: int
    plans: int
    even: float
    affinity: float
    p99_even: float
    p99_affinity: float


cli = typer.Typer(add_completion=False)


@cli.command()
def measure(out: Path, rounds: int = 21, steps: int = 16) -> None:
    """Time decode steps of the bundled model's shape, eager, plans that leave out half of it."""
    alone()
    shape = Shape.of("bundled")
    rows, plans = [1, 4, 8, 16, 32], [1, 2, 4, 8]
    cells = [(number, kinds) for number in rows for kinds in plans]
    taken: dict[tuple[int, int], list[float]] = {cell: [] for cell in cells}
    prompts = []
    options = {"kv_fill": "copy"}
    with (
        TemporaryDirectory() as folder,
        engine(shape.write(Path(folder)), plugin=options, enforce_eager=True) as llm,
    ):
        masks = distinct(shape.num_layers, max(plans))
        for place in range(rounds + 1):
            for number, kinds in cells[:: -1 if place % 2 else 1]:
                batch = following(deal(masks[:kinds], number))
                taken[number, kinds].append(median(decode(llm, batch, steps)))
            prompts.append(first_tokens(llm, following([masks[0]]), TOKENS) / TOKENS)
    # The first round warms up.
    table = [[median(taken[number, kinds][1:]) for kinds in plans] for number in rows]
    found = {"rows": rows, "plans": plans, "steps": table, "token": median(prompts[1:])}
    facts = {"rounds": rounds, "steps_a_round": steps, "model": shape.name}
    out.write_text(json.dumps({**facts, **found}, indent=1) + "\n")


@cli.command()
def simulate(
    costs: Annotated[Path, typer.Argument(help="What `measure` wrote.")],
    out: Path,
    replicas: Annotated[list[int] | None, typer.Option(help="2, 4, 16 and 64.")] = None,
    plans: Annotated[list[int] | None, typer.Option(help="1, 2, 4 and 8.")] = None,
    requests: Annotated[int, typer.Option(help="For each replica; at least for 20.")] = 200,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt; 0: read elsewhere.")] = 256,
    routers: Annotated[int, typer.Option(help="Processes that share the requests.")] = 1,
) -> None:
    """Print throughput and p99 latency of affinity against even spreading, and write them."""
    table = Table("costs", "replicas", "plans", "throughput", "p99", title="affinity / even")
    steps, found = json.loads(costs.read_text()), []
    for name, of in {
        "measured, CPU": lambda _: measured(steps, prompt),
        "H100 model, half left out": lambda kinds: roofline(0.5, kinds, prompt),
        "H100 model, a quarter left out": lambda kinds: roofline(0.25, kinds, prompt),
    }.items():
        for number, kinds in product(replicas or [2, 4, 16, 64], plans or [1, 2, 4, 8]):
            one = _compared(name, of(kinds), number, kinds, routers, requests * max(20, number))
            found.append(one)
            ratios = one.affinity / one.even, one.p99_affinity / one.p99_even
            table.add_row(name, str(number), str(kinds), *(f"{ratio:.2f}" for ratio in ratios))
    out.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")
    Console().print(table)


def _compared(
    name: str, cost: Cost, replicas: int, plans: int, routers: int, requests: int
) -> Found:
    def both(rate: float = 0) -> list[tuple[float, list[float]]]:
        return [run(cost, replicas, plans, one, requests, rate) for one in (0, routers)]

    most = [throughput for throughput, _ in both()]
    late = [quantiles(seconds, n=100)[98] for _, seconds in both(0.8 * most[0])]
    return Found(name, replicas, plans, *most, *late)


if __name__ == "__main__":
    cli()
