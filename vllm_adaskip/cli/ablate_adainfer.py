# SPDX-License-Identifier: Apache-2.0
"""``adaskip ablate adainfer``: what early exits save and cost, task by task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vllm_adaskip.cli import run
from vllm_adaskip.cli.ablate import Out, compare, fitted
from vllm_adaskip.lab.evaluation.results import Answer, Results

if TYPE_CHECKING:
    from vllm_adaskip.classifiers.adainfer.ablate import TaskRow
    from vllm_adaskip.lab.evaluation.results import Setting

#: Gives what is compared, for a model of so many layers.
Fits = Callable[[int], "list[Setting]"]


def adainfer(
    out: Out,
    model: run.Model = "",
    answer_data: Annotated[
        list[str] | None,
        typer.Option(
            "--answer-data",
            help="Where an answer is one token, as for --data of eval; of several each is also "
            "fitted alone (transfer). The bundled sentiment, topic and hop if left out.",
        ),
    ] = None,
    data: run.Data = "bundled",
    limit: run.Limit = 100,
    train_limit: Annotated[int, typer.Option(min=1, help="Training examples a task.")] = 500,
    agreement: Annotated[float, typer.Option(help="Of fits, see adaskip fit adainfer.")] = 0.99,
    max_tokens: run.MaxTokens = 32,
    max_model_len: run.MaxModelLen = 512,
    enforce_eager: run.EnforceEager = False,
    seed: run.Seed = 0,
) -> None:
    """Stop inside prefill where answers are one token; by prompt and by token where they are texts.

    Each classifier, transfer between tasks, fixed depths, fills. Fits what it needs, measures all
    through the real engine, and writes ablation.png into two folders of results.
    """
    with run.plain_errors():
        from vllm_adaskip.classifiers.adainfer.ablate import (
            answer_settings,
            generation_settings,
            rows,
        )

        tasks = answer_data or ["bundled:sentiment", "bundled:topic", "bundled:hop"]
        together = _together(tasks)
        told = ["--agreement", agreement, "--limit", train_limit, "--seed", seed]
        told += ["--model", model] if model else []

        def measure(folder: Path, of: str, fits: Fits, tokens: int) -> int:
            items, source = run.asked(of, limit, seed, "exact_match", None, model)
            manifest = run.described(
                model, source, seed, max_model_len=max_model_len, enforce_eager=enforce_eager
            )
            compare(folder, manifest, fits(manifest.num_layers), items, tokens)
            return manifest.num_layers

        answers = _fits(out, "answer", together, told)
        for one in tasks if len(tasks) > 1 else ():
            answers |= _fits(out, "answer", one, told, f", from {one.rpartition(':')[2]}")
        by_prompt = _fits(out, "prompt", data, told, " by prompt")
        by_token = _fits(out, "token", data, told, " by token")
        layers = measure(
            out / "answers", together, lambda layers: answer_settings(answers, layers), 1
        )
        Console().print(table(rows(Results(out / "answers").read(Answer), layers)))
        measure(
            out / "texts",
            data,
            lambda layers: generation_settings(by_prompt, by_token, layers),
            max_tokens,
        )


def _fits(
    out: Path, scope: str, data: str, told: Sequence[object], name: str = ""
) -> dict[str, Path]:
    """Fit each classifier; give the profiles by name."""
    from vllm_adaskip.classifiers.adainfer.ablate import CLASSIFIERS

    return {
        f"{each}{name}": fitted(
            out / f"{each}{name}".replace(", ", "-").replace(" ", "-"),
            "adainfer",
            ["--data", data, "--classifier", each, "--scope", scope, *told],
        )
        for each in CLASSIFIERS
    }


def _together(sources: Sequence[str]) -> str:
    """Return one source for several of the bundled tasks; others must be one."""
    if len(sources) == 1:
        return sources[0]
    if wrong := [one for one in sources if not one.startswith("bundled:")]:
        raise ValueError(
            f"--answer-data {wrong[0]!r:.80}; allowed: one source, or several of bundled:TASK"
        )
    return "bundled:" + ",".join(one.partition(":")[2] for one in sources)


def table(found: Sequence[TaskRow]) -> Table:
    """Show each classifier on each task."""
    rows = Table(
        *("exits by", "task", "pruned", "score", "loss to dense, points", "at random depths"),
        title="answers of one token; as many exits at each depth, but anybody's: at random depths",
        box=SIMPLE_HEAD,
    )
    for one in found:
        loss = one.loss
        rows.add_row(
            one.setting,
            one.task,
            f"{one.pruned:.1%}",
            f"{one.score:.1%}",
            f"{100 * loss.mean:.1f} ({100 * loss.low:.1f} to {100 * loss.high:.1f})",
            "" if one.at_random is None else f"{one.at_random:.1%}",
        )
    return rows
