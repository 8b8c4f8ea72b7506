# SPDX-License-Identifier: Apache-2.0
"""``adaskip fit adaskip``: a budget for AdaSkip's ranking, and what it would leave out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vllm_adaskip.cli import fit
from vllm_adaskip.cli.run import Model, console, plain_errors

if TYPE_CHECKING:
    from vllm_adaskip.classifiers.ends import EndsOptions
    from vllm_adaskip.classifiers.plan import DecoderShape, SkipPlan
    from vllm_adaskip.lab.fitting.similarity import Floats, Similarities


def adaskip(
    out: fit.Out,
    model: Model = "",
    data: fit.Data = "bundled",
    prompt_column: fit.PromptColumn = "prompt",
    answer_column: fit.AnswerColumn = "answer",
    limit: fit.Limit = 50,
    target_skip: Annotated[
        float, typer.Option(help="Share of decoder compute that each sequence leaves out.")
    ] = 0.25,
    keep_first: Annotated[int, typer.Option(help="First layers never left out.")] = 1,
    keep_last: Annotated[int, typer.Option(help="Last layers never left out.")] = 1,
    prompts: Annotated[
        bool,
        typer.Option("--prompts", help="One set for all prompts; answers run everything."),
    ] = False,
    batch: fit.Batch = 16,
    seed: fit.Seed = 0,
    device: fit.Device = "auto",
) -> None:
    """Write a profile that leaves out the sub-layers most similar on each prompt (AdaSkip).

    Nothing is trained or searched. Prints how similar each is, and how often it would go. With
    --prompts the profile is a prompt plan: what is most similar over all examples, as in AdaSkip's
    prefill.
    """
    with plain_errors():
        from vllm_adaskip.classifiers.base import MethodOptions
        from vllm_adaskip.classifiers.ends import EndsOptions

        options = fit.checked(EndsOptions, keep_first=keep_first, keep_last=keep_last)
        if not 0 < target_skip < 1:
            raise ValueError(f"--target-skip {target_skip:g}; allowed: between 0 and 1")
        one = fit.subject(model, data, (prompt_column, answer_column), limit, batch, seed)
        options.inner(one.config["num_hidden_layers"])
        told = {**options.model_dump(), "target_skip": target_skip, "prompts": prompts}
        if fit.begins(out, "adaskip", one, data, told):
            from vllm_adaskip.lab.fitting.similarity import FILE, draw_similarities

            found, shape = fit.measured(
                one, batch, device,
                lambda shape: options.check(1 - target_skip, shape, "adaskip"),
            )  # fmt: skip
            left_out = often(found, options, 1 - target_skip, shape)
            draw_similarities(found, options.inner(shape.num_layers), None, out)
            metrics: dict[str, float | int | str] = {"examples": len(one.samples)}
            if prompts:
                plan = of_prompts(found, options, 1 - target_skip, shape)
                metrics |= {"compute_kept": plan.share(shape)}
                brought = {"prompt": {"skip": plan.entries()}}
                fit.save(out, "none", one, MethodOptions(), metrics=metrics, **brought)
            else:
                fit.save(out, "adaskip", one, options, max_compute=1 - target_skip, metrics=metrics)
            Console().print(table(found, left_out))
            console.print(f"plot: {out / FILE}", markup=False, soft_wrap=True)
        fit.how_to_go_on(one, out)


def of_prompts(
    found: Similarities, options: EndsOptions, budget: float, shape: DecoderShape
) -> SkipPlan:
    """Return what is most similar over all prompts."""
    from vllm_adaskip.classifiers.adaskip.method import AdaSkip
    from vllm_adaskip.classifiers.base import PromptStatistics

    mean = found.prompts.mean(0)
    return AdaSkip(shape, options).decide(budget, PromptStatistics(1, mean, mean))


def often(found: Similarities, options: EndsOptions, budget: float, shape: DecoderShape) -> Floats:
    """Return ``[2 * num_layers]`` shares of the prompts that leave out each sub-layer."""
    from vllm_adaskip.classifiers.adaskip.method import AdaSkip
    from vllm_adaskip.classifiers.base import PromptStatistics

    method = AdaSkip(shape, options)
    plans = [method.decide(budget, PromptStatistics(1, row, row)) for row in found.prompts]
    shares: Floats = np.mean([plan.mask() for plan in plans], axis=0)
    return shares


def table(found: Similarities, left_out: Floats) -> Table:
    """Show each layer's sub-layers: mean similarity, and how often each is left out."""
    rows = Table(
        *("layer", "attention", "left out", "MLP", "left out"),
        title="cosine of the stream before and after, mean over prompts",
        box=SIMPLE_HEAD,
    )
    mean = found.prompts.mean(0)
    for layer in range(len(mean) // 2):
        attention, mlp = 2 * layer, 2 * layer + 1
        rows.add_row(
            str(layer),
            f"{mean[attention]:.4f}",
            f"{left_out[attention]:.0%}",
            f"{mean[mlp]:.4f}",
            f"{left_out[mlp]:.0%}",
        )
    return rows
