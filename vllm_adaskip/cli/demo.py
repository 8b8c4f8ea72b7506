# SPDX-License-Identifier: Apache-2.0
"""``adaskip demo``: everyday questions to a real model, dense, under a plan, and healed."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from vllm_adaskip.bundled import bundled_model
from vllm_adaskip.classifiers import SkipPlan
from vllm_adaskip.classifiers.profile import Profile
from vllm_adaskip.cli.run import in_this_process, plain_errors
from vllm_adaskip.lab.models import get
from vllm_adaskip.offline import request

if TYPE_CHECKING:
    from vllm import LLM

Entries = list[int | str]

#: Behind the name of a plan that healed layers follow.
HEALED = ", healed"
#: Everyday questions for a model with a chat template.
QUESTIONS = [
    "How many legs does a spider have?",
    "What is 7 plus 5?",
    "What color is the sky?",
    "Why do we sleep?",
    "Write one sentence about the sea.",
    "Who wrote Romeo and Juliet?",
    "What is a dog?",
    "What do bees make?",
]


@dataclass(frozen=True)
class Subject:
    """A model, questions to it as people read them and as it does, and plans.

    Attributes:
        plans: by the names that the tables have for them.
        healed: folder of a profile with layers for tokens under these plans; None: there is none.

    """

    name: str
    path: str
    questions: list[str]
    prompts: list[str]
    plans: dict[str, Entries]
    healed: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What the plugin is told."""
        if self.healed is not None:
            return {"profile": self.healed}
        return {"known_plans": [plan for plan in self.plans.values() if plan]}


def demo(
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds of each variant.")] = 5,
    tokens: Annotated[int, typer.Option(min=2, max=256, help="Tokens of a timed answer.")] = 32,
) -> None:
    """Ask SmolLM2 eight questions, dense, under a plan and healed; time it beside stock vLLM.

    Fetches the model first, as `adaskip get smollm2` does; without a network it is the bundled one.
    """
    in_this_process()  # where engines take turns on the same core; one thread repeats best
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else it compiles on one
    console = Console()
    with plain_errors():
        one = _subject(console)
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        step = progress.add_task(f"compiling {one.name} in stock vLLM (a minute or two)")
        stock = _engine(one.path, {})
        progress.update(step, description=f"compiling {one.name} in vLLM with the plugin")
        plugin = _engine(one.path, one.options)
        progress.update(step, description="answering each question under each plan, in one batch")
        answers, report = _answers(plugin, one)
        if one.healed is not None:
            progress.update(step, description="answering under the plan alone, without healing")
            unhealed = _engine(one.path, {"known_plans": []}, enforce_eager=True)
            answers = {"dense": answers.pop("dense"), **_unhealed(unhealed, one), **answers}
        progress.update(step, description=f"timing {rounds} rounds of {len(one.plans) + 1}")
        timings = _time(stock, plugin, one, rounds, tokens)
    console.print(_answers_table(one, answers))
    console.print(_ran_table(report))
    console.print(_time_table(timings, len(one.prompts), tokens))
    console.print(_verdict(timings), markup=False)


def _subject(console: Console) -> Subject:
    """Return SmolLM2, or the bundled model where nobody gives it, and say so."""
    try:
        path = get("smollm2")
    except (OSError, ModuleNotFoundError) as error:
        reason = str(error).rstrip(".")
        console.print(f"The bundled model stands in for SmolLM2: {reason}.", markup=False)
        return _bundled()
    from vllm_adaskip.lab.data.chat import ChatTemplate

    template = ChatTemplate(path)
    prompts = [template.prompt([{"role": "user", "content": text}]) for text in QUESTIONS]
    healed = get("smollm2-healed")
    plan = Profile.load(Path(healed)).options["skip"]
    plans: dict[str, Entries] = {"dense": [], f"{SkipPlan.parse(plan, 30)}{HEALED}": plan}
    return Subject("SmolLM2", path, QUESTIONS, prompts, plans, healed)


def _bundled() -> Subject:
    """Return the bundled model with a held-out question of eight of its tasks."""
    from vllm_adaskip.lab.testbed.tasks import TASKS, samples

    prompts = [samples(task, "test", 1, 1)[0].prompt for task in TASKS][:8]
    plans: dict[str, Entries] = {"dense": [], "skip 5-6": [5, 6], "skip 3-8": [*range(3, 9)]}
    return Subject("the bundled model", bundled_model(), prompts, prompts, plans)


def _engine(path: str, plugin: Mapping[str, Any], **options: Any) -> LLM:
    """Start an engine, compiled as vLLM is by default; stock vLLM without options of ours."""
    from vllm import LLM

    from vllm_adaskip.launch import engine_args

    return LLM(
        path,
        max_model_len=512,
        max_num_seqs=32,
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
        **(engine_args(**plugin) if plugin else {}),
        **options,
    )


def _answers(llm: LLM, one: Subject) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Return the answers under each plan, all of one batch, and what the worker counted."""
    prompts = [prompt for prompt in one.prompts for _ in one.plans]
    given = _generate(llm, prompts, [*one.plans.values()] * len(one.prompts), max_tokens=32)
    answers = {name: given[place :: len(one.plans)] for place, name in enumerate(one.plans)}
    return answers, llm.collective_rpc("adaskip_report")[0]


def _unhealed(llm: LLM, one: Subject) -> dict[str, list[str]]:
    """Return the answers under the same plans by the model as it is."""
    return {
        name.removesuffix(HEALED): _generate(
            llm, one.prompts, [plan] * len(one.prompts), max_tokens=32
        )
        for name, plan in one.plans.items()
        if plan
    }


def _generate(
    llm: LLM, prompts: Sequence[str], plans: Sequence[Entries | None], **sampling: Any
) -> list[str]:
    """Return the greedy answers of one batch; a plan of None is stock vLLM's, which knows none."""
    from vllm import SamplingParams

    params = [
        SamplingParams(temperature=0, extra_args=request(skip=plan), **sampling) for plan in plans
    ]
    outputs = llm.generate(list(prompts), params, use_tqdm=False)
    return [output.outputs[0].text.strip() for output in outputs]


def _time(
    stock: LLM, plugin: LLM, one: Subject, rounds: int, tokens: int
) -> dict[str, list[float]]:
    """Return seconds of a batch, round by round; variants take turns, so noise favours none."""
    variants: dict[str, tuple[LLM, Entries | None]] = {"stock vLLM, compiled": (stock, None)}
    variants |= {f"everybody {name}": (plugin, plan) for name, plan in one.plans.items()}
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(rounds + 1):
        for name, (llm, plan) in variants.items():
            start = time.perf_counter()
            plans = [plan] * len(one.prompts)
            _generate(llm, one.prompts, plans, max_tokens=tokens, ignore_eos=True)
            if round_:  # the first round warms up
                taken[name].append(time.perf_counter() - start)
    return taken


def _answers_table(one: Subject, answers: Mapping[str, list[str]]) -> Table:
    title = "one batch: each question under each plan"
    table = Table("question", *answers, title=title, box=SIMPLE_HEAD)
    for row in zip(one.questions, *answers.values(), strict=True):
        table.add_row(*(" ".join(text.split()) for text in row), end_section=True)
    return table


def _ran_table(report: Mapping[str, Any]) -> Table:
    """Show what the worker counted: sub-layers that ran equally often stand together."""
    total = report["decode_tokens"]
    ran = np.array([report["attn_run"], report["mlp_run"]]).T.reshape(-1)
    table = Table("sub-layers", "ran", title=f"of {total} generated tokens", box=SIMPLE_HEAD)
    for count in sorted(set(ran.tolist()), reverse=True):
        named = str(SkipPlan.of_mask(ran == count)).removeprefix("skip ")
        table.add_row(named, f"{count} ({count / total:.0%})")
    return table


def _ratios(timings: Mapping[str, list[float]], name: str) -> list[float]:
    """Return a variant's time against stock's, round by round: the machine's drift cancels out."""
    stock = next(iter(timings.values()))
    return [mine / his for mine, his in zip(timings[name], stock, strict=True)]


def _time_table(timings: Mapping[str, list[float]], batch: int, tokens: int) -> Table:
    rounds = len(next(iter(timings.values())))
    title = f"{batch} sequences of {tokens} tokens, {rounds} rounds in turn"
    columns = "variant", "median", "time against stock", "least to most"
    table = Table(*columns, title=title, box=SIMPLE_HEAD)
    for name, seconds in timings.items():
        found = _ratios(timings, name)
        median = f"{statistics.median(seconds) * 1e3:.0f} ms"
        spread = f"{min(found):.2f} to {max(found):.2f}"
        table.add_row(name, median, f"{statistics.median(found):.2f}", spread)
    return table


def _verdict(timings: Mapping[str, list[float]]) -> str:
    """Say of each plan whether it was faster, if all rounds agree."""
    said = []
    for name in [*timings][2:]:
        found = _ratios(timings, name)
        share = statistics.median(found) - 1
        words = f"{abs(share):.0%} {'slower' if share > 0 else 'faster'} than"
        if min(found) <= 1 <= max(found):
            words = "neither faster nor slower in all rounds than"
        said.append(f"'{name.removeprefix('everybody ')}' was {words} compiled stock vLLM")
    return f"{'; '.join(said)}. Read above whether its answers are worth it."
