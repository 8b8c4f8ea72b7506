# SPDX-License-Identifier: Apache-2.0
"""``adaskip fit first``: trains FiRST's routers, and LoRA if asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vllm_adaskip.cli import fit
from vllm_adaskip.cli.run import Model, plain_errors

if TYPE_CHECKING:
    from vllm_adaskip.lab.fitting.quality import TaskQuality


def first(
    out: fit.Out,
    model: Model = "",
    data: fit.Data = "bundled",
    prompt_column: fit.PromptColumn = "prompt",
    answer_column: fit.AnswerColumn = "answer",
    limit: fit.Limit = 500,
    steps: Annotated[int, typer.Option(help="Updates of the routers.")] = 300,
    batch: fit.Batch = 16,
    lr: Annotated[float, typer.Option(help="Highest learning rate of the routers.")] = 0.01,
    penalty: Annotated[
        float, typer.Option(help="Alpha: price of a layer, in nats per answer token.")
    ] = 0.1,
    regularise: Annotated[float, typer.Option(help="Lambda: of the routers' norm.")] = 0.01,
    ce_weight: Annotated[float, typer.Option(help="Weight of the cross-entropy.")] = 1.0,
    router_width: Annotated[
        int, typer.Option(help="Units of a router's hidden layer; 0: linear.")
    ] = 0,
    reduce: Annotated[
        str, typer.Option(help="How a prompt's tokens are reduced: mean, fraction, last.")
    ] = "mean",
    target_skip: Annotated[
        float, typer.Option(help="Share of layers to leave out on average; 0: threshold 0.5.")
    ] = 0.25,
    keep_first: Annotated[int, typer.Option(help="First layers never left out.")] = 1,
    keep_last: Annotated[int, typer.Option(help="Last layers never left out.")] = 1,
    codebook: Annotated[
        int, typer.Option(help="Most plans that decisions snap to; 0: any plan.")
    ] = 8,
    lora_steps: Annotated[int, typer.Option(help="Updates of LoRA weights; 0: no LoRA.")] = 0,
    lora_rank: Annotated[int, typer.Option(help="Rank of the LoRA weights.")] = 8,
    lora_lr: Annotated[float, typer.Option(help="Highest learning rate of LoRA.")] = 1e-3,
    seed: fit.Seed = 0,
    device: fit.Device = "auto",
) -> None:
    """Train FiRST's routers (arXiv 2410.12513), then LoRA if asked for, and write a profile.

    A killed fit goes on with the same command.
    """
    with plain_errors():
        from vllm_adaskip.classifiers.first.fit.settings import FirstSettings
        from vllm_adaskip.classifiers.first.method import FirstOptions

        method = fit.checked(
            FirstOptions, reduce=reduce, keep_first=keep_first, keep_last=keep_last
        )
        settings = fit.checked(
            FirstSettings, method=method,
            steps=steps, batch=batch, lr=lr, penalty=penalty, regularise=regularise,
            ce_weight=ce_weight, router_width=router_width, target_skip=target_skip,
            codebook=codebook, lora_steps=lora_steps, lora_rank=lora_rank, lora_lr=lora_lr,
            seed=seed,
        )  # fmt: skip
        columns = prompt_column, answer_column
        one = fit.subject(model, data, columns, limit, batch, seed)
        settings.check(one.config["num_hidden_layers"])

        told = {
            **settings.model_dump(exclude={"method"}),
            **settings.method.model_dump(include={"reduce", "keep_first", "keep_last"}),
        }
        if fit.begins(out, "first", one, data, told):
            from vllm_adaskip.classifiers.first.fit.fitted import CHECKPOINTS, fit_first
            from vllm_adaskip.lab.fitting.training import draw_curves

            with fit.progress(steps + lora_steps) as report:
                report("loading the model", 0)
                fitted = fit_first(fit.loaded(one, device), one.samples, settings, out, report)
            draw_curves(fitted.curves, out)
            fit.save(out, "first", one, fitted.options, metrics=fitted.metrics)
            for name in CHECKPOINTS:
                (out / name).unlink(missing_ok=True)
            Console().print(table(fitted.tasks))
        fit.how_to_go_on(one, out)


def table(tasks: Sequence[TaskQuality]) -> Table:
    """Show, by task, what the plans of held-back examples leave out and cost."""
    rows = Table(
        *("task", "examples", "right dense", "right routed", "layers skipped", "plans", "often"),
        title="held-back examples, fed with the right tokens",
        caption="plans: how many different ones; often: layers that the commonest leaves out",
        box=SIMPLE_HEAD,
    )
    for one in tasks:
        rows.add_row(
            one.task,
            str(one.samples),
            f"{one.dense:.1%}",
            f"{one.routed:.1%}",
            f"{one.skipped:.1%}",
            str(one.plans),
            ", ".join(map(str, one.often)) or "none",
        )
    return rows
