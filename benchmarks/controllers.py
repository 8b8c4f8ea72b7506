# SPDX-License-Identifier: Apache-2.0
"""Learned controllers that look at hidden states, against static ones, at equal depth.

Trains four kinds of controllers on a frozen model (per token or per sequence, reading the stream
or not), beside random and evenly spaced layers, and compares them at the same number of layers on
held-out questions. See docs/controllers.md.

    python benchmarks/controllers.py --out controllers

Without ``--model`` it is the bundled one, on its own tasks; another one is trained on ``--data``
and asked ``--held-out``, JSON lines of prompts and references.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

# A thread per process: the work is many small products, and the seeds run side by side.
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import numpy as np
import skip_controllers as study
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import bootstrap
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from vllm_adaskip import bundled_model
from vllm_adaskip.lab.data.examples import load_examples
from vllm_adaskip.lab.data.tokens import end_tokens
from vllm_adaskip.lab.fitting.samples import Sample, sample
from vllm_adaskip.lab.testbed import score, tasks
from vllm_adaskip.lab.testbed.batches import IGNORED

#: name -> decides once per sequence, reads the stream
KINDS = {
    "per token, reads": (False, True),
    "per token, static": (False, False),
    "per sequence, reads": (True, True),
    "per sequence, static": (True, False),
}
ROWS, DRAWS, TUNE = 16, 10, 20
MakeGate = Callable[[study.Prefix], study.Gate]


def main(
    steps: Annotated[int, typer.Option(min=1, help="training steps of 16 questions")] = 100,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    targets: Annotated[str, typer.Option(help="shares of layers kept")] = "0.75,0.6,0.4",
    questions: Annotated[int, typer.Option(min=1, help="held-out ones per task")] = 100,
    workers: Annotated[int, typer.Option(min=1, help="processes")] = 2,
    out: Annotated[Path, typer.Option(help="folder for results and plot")] = Path("controllers"),
    model: Annotated[str, typer.Option(help="path or hub id")] = "",
    data: Annotated[str, typer.Option(help="of --model: file to train on")] = "",
    held_out: Annotated[str, typer.Option(help="of --model: file to measure on")] = "",
) -> None:
    """Train, compare, print, and write `results.jsonl` and `controllers.png`."""
    subject = Subject(model, data, held_out)
    depth = subject.load()[0].config.num_hidden_layers
    # Whole layers: a static choice can have nothing else, and all are to have the same.
    depths = sorted({round(float(share) * depth) for share in targets.split(",")}, reverse=True)
    if not 2 < depths[-1] <= depths[0] < depth:
        raise typer.BadParameter(f"between 3 and {depth - 1} of {depth} layers, not {depths}")
    out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    with (
        ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool,
        (out / "results.jsonl").open("w", buffering=1) as file,
    ):
        jobs = [
            pool.submit(learned, subject, seed, steps, depths, questions) for seed in range(seeds)
        ]
        jobs.append(pool.submit(baselines, subject, depths, questions))
        for job in track(jobs, "seeds, baselines"):
            results += job.result()
            file.writelines(json.dumps(result) + "\n" for result in job.result())
    Console().print(quality_table(results), difference_table(results))
    plot(results, out / "controllers.png")


@dataclass(frozen=True)
class Subject:
    """A frozen model with its questions; empty names stand for the bundled one and its tasks."""

    model: str = ""
    data: str = ""
    held_out: str = ""

    def load(self) -> tuple[Any, Any]:
        """Return the model, in float32, and its tokenizer."""
        torch.set_num_threads(1)
        logging.disable_progress_bar()
        path = self.model or bundled_model()
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        return model.eval().requires_grad_(False), AutoTokenizer.from_pretrained(path)

    def training(self, seed: int, tokenizer: Any) -> tuple[Callable[[], study.Questions], Any]:
        """Return what draws a batch to train on, and the batch that sets thresholds."""
        rng = random.Random(f"controllers/{seed}")
        if self.model:
            found = self._read(self.data, tokenizer)
            tune = found[::5]
            train = [one for index, one in enumerate(found) if index % 5]
            return (lambda: of_tokens(rng.sample(train, ROWS), tokenizer)), of_tokens(
                tune, tokenizer
            )

        def draw() -> study.Questions:
            names = rng.choices(list(tasks.TASKS), k=ROWS)
            return study.collate([tasks.draw(name, "train", rng) for name in names], tokenizer)

        drawn = [s for task in tasks.TASKS for s in tasks.samples(task, "tune", seed, TUNE)]
        return draw, study.collate(drawn, tokenizer)

    def asked(self, questions: int, tokenizer: Any) -> Iterator[tuple[str, study.Questions]]:
        """Return each task's held-out questions, at most so many."""
        if not self.model:
            for task in tasks.TASKS:
                drawn = score.questions_of(task, questions, score.HELD_OUT_SEED)
                yield task, study.collate(drawn, tokenizer)
            return
        found = self._read(self.held_out, tokenizer)
        for task in dict.fromkeys(one.task for one in found):
            yield task, of_tokens([one for one in found if one.task == task][:questions], tokenizer)

    def _read(self, data: str, tokenizer: Any) -> list[Sample]:
        items = load_examples(
            data, limit=10**6, seed=0, batch=ROWS, columns=("prompt", "answer"), model=self.model
        )
        ends = end_tokens(self.model, tokenizer)
        return [sample(item, tokenizer, ends) for item in items]


def of_tokens(samples: list[Sample], tokenizer: Any) -> study.Questions:
    """Make one batch of a model's own tokens; answers end as its turns do."""
    prompts = [one.ids[: -one.answer] for one in samples]
    answers = [one.ids[-one.answer :] for one in samples]
    return study.padded(prompts, answers, tokenizer.eos_token_id)


def learned(
    subject: Subject, seed: int, steps: int, depths: list[int], questions: int
) -> list[dict[str, Any]]:
    """Train all kinds for all depths on one stream of questions, and measure them."""
    model, tokenizer = subject.load()
    config = model.config
    torch.manual_seed(seed)
    runs = {
        (kind, layers): study.Controllers(
            config.num_hidden_layers,
            config.hidden_size,
            per_sequence=per_sequence,
            reads=reads,
            keep=(layers - 2) / (config.num_hidden_layers - 2),
        )
        for layers in depths
        for kind, (per_sequence, reads) in KINDS.items()
    }

    draw, tune = subject.training(seed, tokenizer)
    budgets = [(one, layers / config.num_hidden_layers) for (_, layers), one in runs.items()]
    study.train(model, budgets, draw, steps)
    prefix = study.read_prompts(model, tune)
    plain = {key: study.calibrate(model, tune, prefix, one, key[1]) for key, one in runs.items()}
    asked = subject.asked(questions, tokenizer)
    measured = measure(model, asked, [one.gate for one in runs.values()])
    return [
        {"kind": kind, "budget": layers, "seed": seed, "plain_layers": plain[kind, layers]} | result
        for (kind, layers), result in zip(runs, measured, strict=True)
    ]


def baselines(subject: Subject, depths: list[int], questions: int) -> list[dict[str, Any]]:
    """Measure layers taken evenly and at random; the first and the last always stay."""
    model, tokenizer = subject.load()
    last, rng = model.config.num_hidden_layers - 1, random.Random("baselines")
    sets: list[tuple[str, int, int, set[int]]] = []
    for layers in depths:
        skipped = last + 1 - layers
        apart = {1 + int((step + 0.5) * (last - 1) / skipped) for step in range(skipped)}
        sets.append(("evenly spaced", layers, 0, set(range(last + 1)) - apart))
        for draw in range(DRAWS):
            kept = {0, last, *rng.sample(range(1, last), layers - 2)}
            sets.append(("random", layers, draw, kept))
    gates = [lambda _, kept=kept: study.fixed_gate(kept) for *_, kept in sets]
    return [
        {"kind": kind, "budget": layers, "seed": draw} | result
        for (kind, layers, draw, _), result in zip(
            sets, measure(model, subject.asked(questions, tokenizer), gates), strict=True
        )
    ]


@torch.no_grad()
def measure(
    model: Any, asked: Iterator[tuple[str, study.Questions]], gates: Sequence[MakeGate]
) -> list[dict[str, Any]]:
    """Answer held-out questions after the right tokens; one pass over the prompts serves all."""
    passes: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in gates]
    layers_of: list[dict[str, float]] = [{} for _ in gates]
    for task, batch in asked:
        prefix, real = study.read_prompts(model, batch), batch.labels != IGNORED
        for make, parts, layers in zip(gates, passes, layers_of, strict=True):
            logits, used = study.answer(model, batch, prefix, make(prefix))
            right = (logits.argmax(-1) == batch.labels) | ~real
            layers[task] = used[:, real].sum(0).mean().item()
            parts.append((right[real], right.all(1) & prefix.first_right, used[:, real]))
    results = []
    for parts, layers in zip(passes, layers_of, strict=True):
        token, whole, used = (torch.cat(part, dim=-1).float() for part in zip(*parts, strict=True))
        results.append({
            "layers": used.sum(0).mean().item(),
            "tokens_right": token.mean().item(),
            "exact": whole.mean().item(),
            "kept_of_layer": used.mean(1).tolist(),
            "layers_of_task": layers,
            "right": whole.int().tolist(),
        })  # fmt: skip
    return results


def values(results: list[dict[str, Any]], kind: str, budget: int, key: str) -> list[Any]:
    """Return one figure of all seeds or draws."""
    return [r[key] for r in results if (r["kind"], r["budget"]) == (kind, budget)]


def quality_table(results: list[dict[str, Any]]) -> Table:
    """Means over seeds (or draws), with the least and the most."""
    table = Table(
        "budget", "chosen by", "layers", "tokens right", "exact match", "by plain argmax: layers",
        title="held-out questions; mean (least to most) over seeds or draws",
    )  # fmt: skip
    for budget, kind in dict.fromkeys((r["budget"], r["kind"]) for r in results):
        one = [values(results, kind, budget, key) for key in ("layers", "tokens_right", "exact")]
        plain = [r["plain_layers"] for r in results
                 if (r["kind"], r["budget"]) == (kind, budget) and "plain_layers" in r]  # fmt: skip
        table.add_row(
            str(budget), kind, spread(one[0], "{:.2f}"), spread(one[1], "{:.1%}"),
            spread(one[2], "{:.1%}"), spread(plain, "{:.1f}") if plain else "",
        )  # fmt: skip
    return table


def spread(numbers: list[float], form: str) -> str:
    """``mean (least to most)``."""
    mean, low, high = (form.format(x) for x in (np.mean(numbers), min(numbers), max(numbers)))
    return f"{mean} ({low} to {high})"


def difference_table(results: list[dict[str, Any]]) -> Table:
    """Show what reading the stream adds to exact match, in points, question by question."""
    table = Table(
        "budget", "decided", "compared with", "difference", "95 % interval over questions",
        "by seed", title="exact match, points: does reading the stream help?",
    )  # fmt: skip
    for budget in dict.fromkeys(r["budget"] for r in results):
        for when in ("per token", "per sequence"):
            # Evenly spaced layers too: what was learned without reading may be poorly learned.
            for other in (f"{when}, static", "evenly spaced"):
                reads, without = (
                    np.array(values(results, kind, budget, "right"), dtype=float)
                    for kind in (f"{when}, reads", other)
                )
                points = 100 * (reads - without)
                low, high = interval(points.mean(axis=0))
                table.add_row(
                    str(budget), when, other, f"{points.mean():+.1f}",
                    f"{low:+.1f} to {high:+.1f}",
                    ", ".join(f"{one:+.1f}" for one in points.mean(axis=1)),
                )  # fmt: skip
    return table


def interval(paired: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Return the bootstrap interval of a mean of paired differences."""
    if not paired.any():
        return 0.0, 0.0
    found = bootstrap((paired,), np.mean, method="percentile", rng=0).confidence_interval
    return float(found.low), float(found.high)


def plot(results: list[dict[str, Any]], target: Path) -> None:
    """Draw exact match over the layers that ran, a mark for each seed or draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    kinds = ["random", "evenly spaced", *KINDS]
    for kind, mark in zip(kinds, ".x^v^v", strict=True):
        shown = [r for r in results if r["kind"] == kind]
        filled = "per sequence" not in kind
        colour = "tab:blue" if "reads" in kind else "tab:orange" if "static" in kind else "grey"
        # Side by side: otherwise kinds of the same depth hide each other.
        shift = 0.0 if colour == "grey" else 0.12 * (kinds.index(kind) - 3.5)
        axes.plot(
            [r["layers"] + shift for r in shown],
            [100 * r["exact"] for r in shown],
            mark, color=colour, label=kind, fillstyle="full" if filled else "none",
        )  # fmt: skip
    axes.set(xlabel="layers run per answer token (kinds moved apart)", ylabel="exact match, %")
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    typer.run(main)
