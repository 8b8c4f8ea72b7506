# SPDX-License-Identifier: Apache-2.0
"""``adaskip fit static``: searches for one plan that all sequences follow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vllm_adaskip.classifiers.plan import DecoderShape, SkipPlan
from vllm_adaskip.classifiers.static.method import StaticOptions
from vllm_adaskip.cli import fit
from vllm_adaskip.cli.run import Model, plain_errors

if TYPE_CHECKING:
    from vllm_adaskip.classifiers.static.fit import Found, StaticSettings


def static(
    out: fit.Out,
    model: Model = "",
    data: fit.Data = "bundled",
    prompt_column: fit.PromptColumn = "prompt",
    answer_column: fit.AnswerColumn = "answer",
    limit: Annotated[
        int, typer.Option(min=1, help="Examples of each task; every loss reads all of them.")
    ] = 20,
    batch: Annotated[int, typer.Option(min=1, help="Examples read at once.")] = 8,
    search: Annotated[
        str, typer.Option(help="greedy (by the answers' loss), late, uniform, random.")
    ] = "greedy",
    unit: Annotated[
        str, typer.Option(help="What is left out one by one: layer, attention, mlp, sub-layer.")
    ] = "layer",
    target_skip: Annotated[
        float, typer.Option(help="Share of the model's units to leave out.")
    ] = 0.25,
    keep_first: Annotated[int, typer.Option(help="First layers never left out.")] = 1,
    keep_last: Annotated[int, typer.Option(help="Last layers never left out.")] = 1,
    seed: fit.Seed = 0,
    device: fit.Device = "auto",
) -> None:
    """Search for one plan (SLEB, arXiv 2402.09025, and what it must beat); write a profile.

    Takes one to two minutes on one core for the bundled model at most. A killed search goes on
    with the same command.
    """
    with plain_errors():
        from vllm_adaskip.classifiers.static.fit import LOSSES, StaticSettings, draw_search

        settings = fit.checked(
            StaticSettings, search=search, unit=unit, target_skip=target_skip,
            keep_first=keep_first, keep_last=keep_last, seed=seed,
        )  # fmt: skip
        one = fit.subject(model, data, (prompt_column, answer_column), limit, batch, seed)
        settings.count(one.config["num_hidden_layers"])
        if fit.begins(out, "static", one, data, settings.model_dump()):
            found, shape = _searched(out, one, settings, batch, device)
            if settings.search == "greedy":
                draw_search(found.steps, unit, out)
            fit.save(
                out, "static", one, StaticOptions(skip=found.plan.entries()),
                metrics=_metrics(found, shape, settings, len(one.samples)),
            )  # fmt: skip
            (out / LOSSES).unlink()
            Console().print(table(found, shape))
        fit.how_to_go_on(one, out)


def _searched(
    out: Path, one: fit.Subject, settings: StaticSettings, batch: int, device: str
) -> tuple[Found, DecoderShape]:
    """Load the model and search, with a bar of losses; also weigh the model's layers."""
    from vllm_adaskip.classifiers.static.fit import KnownLosses, search
    from vllm_adaskip.lab.fitting.quality import PlanLoss
    from vllm_adaskip.lab.fitting.sub_layers import decoder_shape

    num_layers = one.config["num_hidden_layers"]
    with fit.progress(settings.losses(num_layers)) as report:
        report("loading the model", 0)
        model = fit.loaded(one, device)
        report("trying plans", 0)
        known = KnownLosses(out, PlanLoss(model, one.samples, batch))
        found = search(_counted(known, report), settings, num_layers)
        return found, decoder_shape(model)


def _counted(
    loss: Callable[[SkipPlan], float], report: Callable[[str, int], None]
) -> Callable[[SkipPlan], float]:
    def counted(plan: SkipPlan) -> float:
        found = loss(plan)
        report("trying plans", 1)
        return found

    return counted


def _metrics(
    found: Found, shape: DecoderShape, settings: StaticSettings, examples: int
) -> dict[str, float | int | str]:
    return {
        "search": settings.search,
        "unit": settings.unit,
        "examples": examples,
        "loss_dense": found.steps[0].loss,
        "loss": found.steps[-1].loss,
        "compute_kept": found.plan.share(shape),
    }


def doubt(found: Found) -> str | None:
    """Say so if a damaged model took the references better than the whole one."""
    dense, loss = found.steps[0].loss, found.steps[-1].loss
    if loss > 0.95 * dense:  # less than that may be luck
        return None
    return (
        f"less than the whole model's {dense:.4g}: these references are not what it writes, so the "
        "search did not look for what keeps its answers; give it answers of its own"
    )


def table(found: Found, shape: DecoderShape) -> Table:
    """Show what went step by step, each with the loss then; the last row is the plan."""
    rows = Table(
        *("step", "goes", "left out", "compute kept", "loss"),
        title="loss: cross-entropy of the answers in nats, prompts at full depth",
        caption=doubt(found),
        box=SIMPLE_HEAD,
    )
    before: set[int | str] = set()
    for number, step in enumerate(found.steps):
        plan = SkipPlan.parse([*step.left_out], shape.num_layers)
        went = ", ".join(str(one) for one in step.left_out if one not in before)
        before = {*step.left_out}
        rows.add_row(str(number), went, str(plan), f"{plan.share(shape):.1%}", f"{step.loss:.4g}")
    return rows
