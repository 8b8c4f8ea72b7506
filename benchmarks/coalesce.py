# SPDX-License-Identifier: Apache-2.0
"""What sharing plans in a batch wins and costs: throughput against quality, from 0 to 1.

The bundled model under `first` and `adaskip`, within one budget. Quality is exact match on
held-out questions of all tasks, mixed, in batches of the timed size. Throughput is that of a batch
of other questions, prefill and decisions included, against the same batch dense, which takes turns
with it in the same engine, other questions in each round. See docs/coalesce.md.

    python benchmarks/coalesce.py --out build/coalesce
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_LOGGING_LEVEL="ERROR",
    OMP_NUM_THREADS="1",
)

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vllm_adaskip import bundled_model, bundled_profile
from vllm_adaskip.lab.data.items import Item
from vllm_adaskip.lab.data.sources import load_items
from vllm_adaskip.lab.evaluation.engine import CHUNK, Engine, kept
from vllm_adaskip.lab.evaluation.quality import loss_to
from vllm_adaskip.lab.evaluation.results import Answer, Setting
from vllm_adaskip.lab.evaluation.settings import DENSE

METHODS: dict[str, dict[str, Any]] = {
    "first": {"profile": bundled_profile("first")},
    "adaskip": {},
}
ANSWER = 12  # tokens at most, as in `adaskip eval` of these tasks
TASKS = 9


@dataclass(frozen=True)
class Point:
    """One method at one value of `coalesce_regret`.

    Attributes:
        exact: share of questions answered right, of 1; ``loss`` to dense with its 95 % interval.
        skipped: share of decoder compute that generated tokens of a timed batch left out.
        plans: mean number of distinct plans in a step of such a batch.
        weights: mean share of the decoder's weights that its generated tokens need in a step.
        speeds: throughput against dense, of each round.

    """

    method: str
    coalesce: float
    exact: float
    loss: tuple[float, float, float]
    skipped: float
    plans: float
    weights: float
    speeds: list[float]


def main(
    rounds: Annotated[int, typer.Option(min=2, help="timed, of each setting")] = 9,
    questions: Annotated[int, typer.Option(min=1, help="of each of the nine tasks")] = 60,
    max_compute: Annotated[float, typer.Option(help="share of compute to keep at most")] = 0.5,
    values: Annotated[str, typer.Option(help="of coalesce_regret")] = "0,0.1,0.25,0.5,0.75,1",
    tokens: Annotated[int, typer.Option(min=2, help="of each timed sequence")] = 64,
    out: Annotated[Path, typer.Option(help="folder for results and plot")] = Path("coalesce"),
) -> None:
    """Answer and time every method at every value; print, and write JSON and a plot."""
    items = mixed(load_items("bundled", limit=questions))
    others = mixed(load_items("bundled", limit=-(-CHUNK * (rounds + 1) // TASKS), seed=1))
    prompts = [one.prompt for one in others]
    batches = [prompts[start : start + CHUNK] for start in range(0, CHUNK * (rounds + 1), CHUNK)]
    cases = [(name, float(value)) for name in METHODS for value in values.split(",")]
    dense: list[Answer] = []
    points = []
    for name, value in track(cases, "settings"):
        engine = Engine(
            bundled_model(),
            name,
            {**METHODS[name], "max_compute": max_compute, "coalesce_regret": value},
            enforce_eager=True,
            max_model_len=256,
            max_num_seqs=CHUNK,
            distributed_executor_backend="uni",
        )
        dense = dense or answers(engine, DENSE, items)
        points.append(measured(engine, name, value, max_compute, items, dense, batches, tokens))
        engine.close()
    out.mkdir(parents=True, exist_ok=True)
    facts = {"budget": max_compute, "batch": CHUNK, "tokens": tokens, "questions": len(items)}
    facts |= {"dense_exact": float(np.mean([one.score for one in dense]))}
    found = {**facts, "points": [asdict(one) for one in points]}
    (out / "coalesce.json").write_text(json.dumps(found, indent=1) + "\n")
    Console(width=max(Console().width, 130)).print(table(points, facts))
    plot(points, out / "coalesce.png")


def mixed(items: Sequence[Item]) -> list[Item]:
    """Return questions of all tasks in turn, so that every batch has some of each."""
    by_task: dict[str, list[Item]] = {}
    for item in items:
        by_task.setdefault(item.task, []).append(item)
    return [item for turn in zip(*by_task.values(), strict=False) for item in turn]


def answers(engine: Engine, setting: Setting, items: Sequence[Item]) -> list[Answer]:
    """Answer all questions."""
    return [one for part in engine.answers(setting, items, ANSWER) for one in part]


def measured(
    engine: Engine,
    method: str,
    coalesce: float,
    budget: float,
    items: Sequence[Item],
    dense: Sequence[Answer],
    batches: Sequence[Sequence[str]],
    tokens: int,
) -> Point:
    """Measure one setting; its first batch warms up, and is looked at step by step."""
    setting = Setting(name="own", family=method, method=method, budget=budget)
    quality = loss_to(dense, answers(engine, setting, items))
    assert quality is not None
    engine.seconds(DENSE, batches[0], tokens)
    skipped, plans, weights = looked_at(engine, setting, batches[0], tokens)
    speeds = []
    for round_, prompts in enumerate(batches[1:]):
        pair = [DENSE, setting] if round_ % 2 else [setting, DENSE]
        seconds = {one.name: engine.seconds(one, prompts, tokens) for one in pair}
        speeds.append(seconds[DENSE.name] / seconds[setting.name])
    loss = quality.loss
    return Point(
        method,
        coalesce,
        quality.mean,
        (loss.mean, loss.low, loss.high),
        skipped,
        plans,
        weights,
        speeds,
    )


def looked_at(
    engine: Engine, setting: Setting, prompts: Sequence[str], tokens: int
) -> tuple[float, float, float]:
    """Run a batch, not timed; give the compute left out, plans a step, and weights a step."""
    shape, seen = engine.shape, []
    parameters = np.tile([shape.attention_parameters, shape.mlp_parameters], shape.num_layers)

    def watch(model: Any) -> None:
        begin_step, table = model.adaskip.begin, model.adaskip.state.table

        def begin() -> Any:
            step, followed = begin_step(), table.followed
            if len(followed):
                needed = ~followed.all(axis=0)
                seen.append((table.live_plans, parameters @ needed))
            return step

        model.adaskip.begin = begin

    def unwatch(model: Any) -> None:
        del model.adaskip.begin  # the class's own is behind it

    before = engine.llm.collective_rpc("adaskip_report")[0]
    engine.llm.apply_model(watch)
    engine.seconds(setting, prompts, tokens)
    engine.llm.apply_model(unwatch)
    after = engine.llm.collective_rpc("adaskip_report")[0]
    generated = after["decode_tokens"] - before["decode_tokens"]
    left_out = [
        1 - (after[key][layer] - before[key][layer]) / generated
        for layer in range(shape.num_layers)
        for key in ("attn_run", "mlp_run")
    ]
    plans, weights = np.mean(seen, axis=0)
    return 1 - kept(left_out, shape), float(plans), float(weights / parameters.sum())


def table(points: Sequence[Point], facts: dict[str, Any]) -> Table:
    """Lay out all figures."""
    found = Table(
        "method", "regret", "compute skipped", "plans a step", "weights a step", "exact match",
        "loss to dense, points", "throughput against dense",
        title=f"budget {facts['budget']:g}, batch {facts['batch']}, {facts['questions']} questions "
        f"(dense: {facts['dense_exact']:.1%} right); loss with 95 % interval, throughput: median "
        "and quartiles",
    )  # fmt: skip
    for one in points:
        loss, low, high = (100 * value for value in one.loss)
        first, middle, third = statistics.quantiles(one.speeds, n=4)
        found.add_row(
            one.method, f"{one.coalesce:g}", f"{one.skipped:.1%}", f"{one.plans:.1f}",
            f"{one.weights:.1%}", f"{one.exact:.1%}", f"{loss:.1f} ({low:.1f} to {high:.1f})",
            f"{middle:.2f} ({first:.2f} to {third:.2f})",
        )  # fmt: skip
    return found


def plot(points: Sequence[Point], target: Path) -> None:
    """Draw the frontier: exact match over throughput, with interval and quartiles."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for method, colour in zip(METHODS, ("tab:blue", "tab:orange"), strict=True):
        shown = [one for one in points if one.method == method]
        first, middle, third = np.array([statistics.quantiles(p.speeds, n=4) for p in shown]).T
        exact = np.array([100 * one.exact for one in shown])
        loss, low, high = 100 * np.array([one.loss for one in shown]).T
        axes.errorbar(
            middle, exact, fmt="-o", color=colour, label=method, capsize=2, lw=1, ms=4,
            xerr=np.maximum([middle - first, third - middle], 0),
            yerr=np.maximum([high - loss, loss - low], 0),  # a larger loss lies lower
        )  # fmt: skip
        for one, x, y in zip(shown, middle, exact, strict=True):
            axes.annotate(f"{one.coalesce:g}", (x, y), xytext=(4, 4), textcoords="offset points")
    axes.set(xlabel="throughput against dense", ylabel="exact match, %")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    typer.run(main)
