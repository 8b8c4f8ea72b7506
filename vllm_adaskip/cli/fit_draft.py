# SPDX-License-Identifier: Apache-2.0
"""``adaskip fit draft``: trains layers that draft for a model, whose answers stay as they are."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vllm_adaskip.cli import fit
from vllm_adaskip.cli.run import ApplyChatTemplate, Model, plain_errors


def draft(
    out: Annotated[
        Path, typer.Option(help="Folder for the draft; its own answers are kept there.")
    ],
    model: Model = "",
    data: fit.Data = "bundled",
    prompt_column: fit.PromptColumn = "prompt",
    answer_column: fit.AnswerColumn = "answer",
    apply_chat_template: ApplyChatTemplate = False,
    limit: fit.Limit = 500,
    exit: Annotated[
        int, typer.Option(help="First layers that draft; 0: a fifth of the model's.")
    ] = 0,
    vocabulary: Annotated[
        int, typer.Option(min=0, help="Tokens that drafts may have, the most frequent; 0: all.")
    ] = 8192,
    answers: fit.Answers = "own",
    tokens: fit.AnswerTokens = 128,
    minutes: Annotated[float, typer.Option(min=0.01, help="Of training.")] = 30.0,
    batch: fit.Batch = 16,
    rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 5e-4,
    seed: fit.Seed = 0,
    device: fit.Device = "auto",
) -> None:
    """Train a copy of MODEL's first layers to draft what MODEL says; MODEL itself stays as it is.

    Ctrl-C ends training early and keeps what was trained.
    """
    with plain_errors():
        fit.check_answers(answers)
        one = fit.subject(
            model, data, (prompt_column, answer_column), limit, batch, seed,
            apply_chat_template=apply_chat_template,
        )  # fmt: skip
        from vllm_adaskip.engine.draft_weights import FILE
        from vllm_adaskip.lab.fitting.draft import Settings

        layers = one.config["num_hidden_layers"]
        exit = exit or max(1, layers // 5)
        if not 1 <= exit < layers:
            raise ValueError(f"--exit {exit}; allowed: 1 to {layers - 1}")
        settings = Settings(exit, vocabulary, minutes, batch, rate, seed)
        told = {**vars(settings), "answers": answers, "tokens": tokens}
        if fit.begins(out, "draft", one, data, told, made=FILE):
            _fit(out, one, settings, answers, tokens, device)
        name = shlex.quote(str(out))
        console = Console()
        console.print(f"draft: {out}; serve with it", style="bold")
        console.print(
            f"vllm serve {shlex.quote(one.path)} --plugin adaskip "
            f"--additional-config.adaskip.draft.profile {name}",
            soft_wrap=True, highlight=False,
        )  # fmt: skip


def _fit(
    out: Path, one: fit.Subject, settings: Any, answers: str, tokens: int, device: str
) -> None:
    from vllm_adaskip.lab.fitting.draft import Draft, accepted, frequent, saved, train
    from vllm_adaskip.lab.fitting.samples import held_back

    judging, training = held_back(fit.answered(one, answers, tokens, out))
    size = one.config["vocab_size"]
    with fit.progress(100 + len(judging) + len(training)) as report:
        report("loading the model", 0)
        whole = fit.loaded(one, device)
        made = Draft(whole, settings.exit, frequent(training, settings.vocabulary, size))
        judging, training = (
            made.read(some, lambda done: report("reading answers", done))
            for some in (judging, training)
        )
        before = accepted(made, judging, whole.device)
        losses = train(made, training, settings, whole.device, _saying(report))
        report("measuring", 0)
        after = accepted(made, judging, whole.device)
    metrics = {f"accepted at place {at + 1}": round(share, 3) for at, share in enumerate(after)}
    saved(made, out, one.name, one.config, {**metrics, "updates": len(losses)})
    table = Table(
        "place in a draft", "before", "after", box=SIMPLE_HEAD,
        title=f"share of the model's tokens that {settings.exit} layers have right, "
        f"of {len(judging)} answers held back",
    )  # fmt: skip
    for at, shares in enumerate(zip(before, after, strict=True)):
        table.add_row(str(at + 1), *(f"{share:.1%}" for share in shares))
    Console().print(table)


def _saying(report: Callable[[str, int], None]) -> Callable[[float, float], None]:
    """Return what turns the share of the time that is over into steps of a hundred."""
    shown = 0

    def say(over: float, loss: float) -> None:
        nonlocal shown
        now = int(100 * over)
        report(f"training, loss {loss:.2f}", now - shown)
        shown = now

    return say
