# SPDX-License-Identifier: Apache-2.0
"""``adaskip demo``: one batch, several plans, on the bundled model in a real engine."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from vllm_adaskip.classifiers import DecoderShape, SkipPlan

if TYPE_CHECKING:
    from vllm import LLM

    from vllm_adaskip.lab.testbed.tasks import Sample

Entries = list[int | str]

#: Plans that the demo deals out in turn; the first is dense.
PLANS: list[Entries] = [
    [],
    [5, 6],
    [5, 6, "attn:7"],
    ["attn:8", "attn:9", "attn:10", "attn:11"],
    ["mlp:4", "mlp:5", "mlp:6"],
    [3, 4, 5, 6, 7, 8],
]


@dataclass(frozen=True)
class Timing:
    """Seconds of one variant's rounds."""

    name: str
    kept: float
    seconds: list[float]


def demo(
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds of each variant.")] = 7,
    tokens: Annotated[int, typer.Option(min=2, max=256, help="Tokens a timed answer.")] = 64,
    batch: Annotated[int, typer.Option(min=1, max=64, help="Sequences in the timed batch.")] = 16,
) -> None:
    """Answer held-out questions in one batch, each with a plan of its own, and time it."""
    # In one process, so that variants take turns on the same core.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # The bundled model is too small to share a step among threads; one repeats best.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    console = Console()
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        step = progress.add_task("starting vLLM with the bundled model")
        llm = _engine()
        shape = _shape(llm)
        progress.update(step, description="answering one batch of questions, a plan each")
        questions = _questions()
        plans = _deal(len(questions))
        answers = _generate(llm, [question.prompt for question in questions], plans)
        report = llm.collective_rpc("adaskip_report")[0]
        progress.update(step, description=f"timing {rounds} rounds of 3 variants, in turn")
        prompts = [question.prompt for question in _questions(batch)]
        timings = _time(llm, shape, prompts, rounds, tokens)
    console.print(_answers_table(shape, questions, plans, answers))
    console.print(_rows_table(report))
    console.print(_time_table(timings, batch, tokens))


def _engine() -> LLM:
    from vllm import LLM

    from vllm_adaskip.bundled import bundled_model
    from vllm_adaskip.launch import engine_args

    return LLM(
        bundled_model(),
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=64,
        distributed_executor_backend="uni",
        **engine_args(),
    )


def _shape(llm: LLM) -> DecoderShape:
    from vllm_adaskip.model_executors.registry import FAMILIES

    return FAMILIES["LlamaForCausalLM"].shape(llm.llm_engine.model_config.hf_config)


def _questions(count: int | None = None) -> list[Sample]:
    """Held-out questions: one of each task, or ``count`` of them in turn."""
    from vllm_adaskip.lab.testbed.tasks import TASKS, samples

    count = count or len(TASKS)
    per_task = -(-count // len(TASKS))
    drawn = [samples(task, "test", 1, per_task) for task in TASKS]
    return [questions[index] for index in range(per_task) for questions in drawn][:count]


def _deal(count: int) -> list[Entries]:
    return list(islice(cycle(PLANS), count))


def _generate(
    llm: LLM, prompts: Sequence[str], plans: Sequence[Entries], **sampling: Any
) -> list[str]:
    """Give the greedy answers of one batch."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=0,
            extra_args={"adaskip_skip": plan},
            **{"max_tokens": 24, **sampling},
        )
        for plan in plans
    ]
    outputs = llm.generate(list(prompts), params, use_tqdm=False)
    return [output.outputs[0].text.strip() for output in outputs]


def _time(
    llm: LLM, shape: DecoderShape, prompts: list[str], rounds: int, tokens: int
) -> list[Timing]:
    """Run the variants in turn, so that a noisy machine favours none."""
    dense, shared = PLANS[0], PLANS[-1]
    variants = {
        "everybody dense": [dense] * len(prompts),
        f"everybody '{SkipPlan.parse(shared, shape.num_layers)}'": [shared] * len(prompts),
        f"{len(PLANS)} plans mixed": _deal(len(prompts)),
    }
    timings = [Timing(name, _kept(plans, shape), []) for name, plans in variants.items()]
    for round_ in range(rounds + 1):
        for timing, plans in zip(timings, variants.values(), strict=True):
            start = time.perf_counter()
            _generate(llm, prompts, plans, max_tokens=tokens, ignore_eos=True)
            if round_:  # the first round warms up
                timing.seconds.append(time.perf_counter() - start)
    return timings


def _kept(plans: Sequence[Entries], shape: DecoderShape) -> float:
    return statistics.fmean(SkipPlan.parse(plan, shape.num_layers).share(shape) for plan in plans)


def _answers_table(
    shape: DecoderShape, questions: list[Sample], plans: list[Entries], answers: list[str]
) -> Table:
    columns = "task", "question", "plan", "kept", "answer", "right?"
    table = Table(*columns, title="one batch, a plan each", box=SIMPLE_HEAD)
    for question, entries, answer in zip(questions, plans, answers, strict=True):
        plan = SkipPlan.parse(entries, shape.num_layers)
        text = question.prompt.removeprefix(f"{question.task} : ").removesuffix(" answer :")
        verdict = "yes" if answer == question.answer else f"no: {question.answer}"
        kept = f"{plan.share(shape):.0%}"
        table.add_row(question.task, text, str(plan), kept, answer, verdict)
    return table


def _rows_table(report: dict[str, Any]) -> Table:
    """Show what the worker counted while it answered."""
    total = report["decode_tokens"]
    table = Table(
        "decoder layer",
        *map(str, range(report["num_layers"])),
        title=f"generated tokens that ran each sub-layer, of {total}",
        box=SIMPLE_HEAD,
    )
    table.add_row("attention", *map(str, report["attn_run"]))
    table.add_row("MLP", *map(str, report["mlp_run"]))
    return table


def _time_table(timings: list[Timing], batch: int, tokens: int) -> Table:
    table = Table(
        "variant",
        "compute kept",
        "median",
        "fastest to slowest",
        "time against dense",
        title=f"{batch} sequences of {tokens} tokens, {len(timings[0].seconds)} rounds in turn",
        caption="time against dense: median of the ratios in each round; below 1 is faster",
        box=SIMPLE_HEAD,
    )
    for timing in timings:
        # Round by round against the dense run beside it: drift of the machine cancels out.
        pairs = zip(timing.seconds, timings[0].seconds, strict=True)
        ratio = statistics.median(mine / dense for mine, dense in pairs)
        table.add_row(
            timing.name,
            f"{timing.kept:.0%}",
            f"{statistics.median(timing.seconds) * 1e3:.0f} ms",
            f"{min(timing.seconds) * 1e3:.0f} to {max(timing.seconds) * 1e3:.0f} ms",
            f"{ratio:.2f}",
        )
    return table
