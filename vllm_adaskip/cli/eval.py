# SPDX-License-Identifier: Apache-2.0
"""``adaskip eval``: what each way of skipping costs in quality, and saves in time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from vllm_adaskip.cli import run
from vllm_adaskip.engine.prompt_plan import TAIL
from vllm_adaskip.lab.evaluation.results import Results
from vllm_adaskip.lab.evaluation.settings import adapters_alone, distinct, explicit, shortened

if TYPE_CHECKING:
    from vllm_adaskip.lab.evaluation.summary import Summary


def evaluate(
    out: Annotated[Path, typer.Option(help="Folder for the results; an earlier run goes on.")],
    model: run.Model = "",
    data: run.Data = "bundled",
    columns: run.Columns = "",
    apply_chat_template: run.ApplyChatTemplate = False,
    lm_eval_path: run.LmEvalPath = None,
    limit: run.Limit = 100,
    metric: run.Metric = "exact_match",
    method: run.Methods = None,
    options: run.Options = "{}",
    profile: run.Profiles = None,
    plans: run.Families = None,
    skip: Annotated[list[str] | None, typer.Option(help="A plan as JSON, [5, 6].")] = None,
    prompt_exit: run.PromptExits = None,
    prompt_tail: run.PromptTail = TAIL,
    budget: run.Budgets = None,
    target_skip: run.Targets = None,
    draws: Annotated[int, typer.Option(min=1, help="Random plans for each budget.")] = 3,
    max_tokens: run.MaxTokens = 32,
    rounds: run.Rounds = 5,
    batch: run.Batch = 16,
    max_model_len: run.MaxModelLen = 512,
    enforce_eager: run.EnforceEager = False,
    seed: run.Seed = 0,
) -> None:
    """Run a model dense and under skip plans on a data set, through the real engine.

    With no --method, --profile, --plans, --skip and --prompt-exit: method adaskip, and all
    families of fixed plans.
    """
    if not (method or profile or plans or skip or prompt_exit):
        method, plans = ["adaskip"], ["uniform", "random", "exit"]
    with run.plain_errors():
        from vllm_adaskip.lab.evaluation.doubt import doubts

        items, source = run.asked(
            data, limit, seed, metric, lm_eval_path, model, columns, apply_chat_template
        )
        manifest = run.described(
            model, source, seed, max_model_len=max_model_len, enforce_eager=enforce_eager
        )
        settings = distinct([
            *(explicit(run.parsed(one, "--skip", list), manifest.num_layers) for one in skip or ()),
            *shortened(prompt_exit or (), prompt_tail, manifest.num_layers),
            *run.candidates(manifest.num_layers, plans, method, options, budget, draws, seed),
            *adapters_alone(run.profiles(profile, budget, target_skip, manifest)),
        ])  # fmt: skip
        results = Results(out)
        run.answer_and_time(
            results, manifest, settings, items,
            max_tokens=max_tokens, rounds=rounds, batch=batch,
        )  # fmt: skip
        summary = run.summarised(results)
        Console().print(table(summary))
        run.say_doubts(doubts(summary))
    run.console.print(f"results: {out}; a page of them: adaskip report {out}")


def table(summary: Summary) -> Table:
    """Show quality, compute and time of each setting."""
    rows = Table(
        "setting", "compute kept", "score", "loss to dense", "time against dense",
        title="95 % bootstrap intervals, paired by item; times: median and quartiles",
    )  # fmt: skip
    if summary.dense.reading:
        rows.add_column("agreement")
        rows.add_column("surprise")
        rows.caption = (
            "agreement: tokens that the whole model would have chosen; surprise: nats a token by "
            "which it prefers its own. Dense's are the noise; a profile with LoRA is read by the "
            "model without it"
        )
    for one in summary.settings:
        quality = one.score or one.perplexity
        loss, speed = "", ""
        if quality and one is not summary.dense:
            loss = f"{quality.loss.mean:+.3f} ({quality.loss.low:+.3f} to {quality.loss.high:+.3f})"
        if summary.batch in one.speeds:
            time = one.speeds[summary.batch]
            speed = f"{time.median:.2f} ({time.low:.2f} to {time.high:.2f})"
        mean = f"{quality.mean:.3f}" if quality else ""
        row = [one.name, f"{one.kept:.0%}", mean, loss, speed]
        if one.reading:
            row += [f"{one.reading.agreement:.1%}", f"{one.reading.surprise:.3f}"]
        rows.add_row(*row)
    return rows
