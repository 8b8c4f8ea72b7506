# SPDX-License-Identifier: Apache-2.0
"""``adaskip fit ffn-skip``: finds FFN-SkipLLM's cold regions and its threshold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vllm_adaskip.cli import fit
from vllm_adaskip.cli.run import Model, console, plain_errors

if TYPE_CHECKING:
    from vllm_adaskip.classifiers.ffn_skip.fit import Fitted
    from vllm_adaskip.lab.fitting.similarity import Similarities


def ffn_skip(
    out: fit.Out,
    model: Model = "",
    data: fit.Data = "bundled",
    prompt_column: fit.PromptColumn = "prompt",
    answer_column: fit.AnswerColumn = "answer",
    limit: fit.Limit = 50,
    target_skip: Annotated[
        float, typer.Option(help="Share of all MLPs to leave out on average.")
    ] = 0.25,
    scope: Annotated[
        str, typer.Option(help="sequence: the prompt decides; token: each generated token.")
    ] = "sequence",
    warm_up: Annotated[
        int, typer.Option(help="Generated tokens before any decides; scope token only.")
    ] = 25,
    max_skip: Annotated[
        int, typer.Option(help="Most MLPs that one sequence, or token, leaves out; 0: all.")
    ] = 0,
    keep_first: Annotated[
        int, typer.Option(help="First layers whose MLPs always run; -1: found.")
    ] = -1,
    keep_last: Annotated[int, typer.Option(help="The same of the last layers; -1: found.")] = -1,
    batch: fit.Batch = 16,
    seed: fit.Seed = 0,
    device: fit.Device = "auto",
) -> None:
    """Find cold regions and threshold of FFN-SkipLLM (arXiv 2404.03865), and write a profile.

    Nothing is trained. Prints how little each layer's MLP changes the stream, and draws it.
    """
    with plain_errors():
        from vllm_adaskip.classifiers.ffn_skip.fit import FfnSkipSettings, fit_ffn_skip
        from vllm_adaskip.classifiers.ffn_skip.method import FfnSkipOptions

        settings = fit.checked(
            FfnSkipSettings,
            target_skip=target_skip,
            method=fit.checked(
                FfnSkipOptions, scope=scope, warm_up=warm_up, max_skip=max_skip or None
            ),
            keep_first=None if keep_first == -1 else keep_first,
            keep_last=None if keep_last == -1 else keep_last,
        )
        one = fit.subject(model, data, (prompt_column, answer_column), limit, batch, seed)
        settings.check(one.config["num_hidden_layers"])
        told = {
            **settings.model_dump(exclude={"method"}),
            **settings.method.model_dump(include={"scope", "warm_up", "max_skip"}),
        }
        if fit.begins(out, "ffn-skip", one, data, told):
            from vllm_adaskip.lab.fitting.similarity import FILE, draw_similarities

            found, _ = fit.measured(one, batch, device)
            fitted = fit_ffn_skip(found, settings)
            middle = fitted.options.inner(len(fitted.by_layer))
            draw_similarities(found, middle, fitted.options.threshold, out)
            metrics = {"examples": len(one.samples), "skipped": fitted.skipped}
            fit.save(out, "ffn-skip", one, fitted.options, metrics=metrics)
            Console().print(table(found, fitted))
            console.print(f"plot: {out / FILE}", markup=False, soft_wrap=True)
        fit.how_to_go_on(one, out)


def table(found: Similarities, fitted: Fitted) -> Table:
    """Show each layer: mean similarities of its sub-layers, and how often its MLP is left out."""
    options = fitted.options
    rows = Table(
        *("layer", "MLP, prompts", "MLP, answers", "attention, prompts", "MLP left out"),
        title=f"cosine of the stream before and after; threshold {options.threshold:.5f}",
        caption=f"{fitted.skipped:.1%} of MLPs left out, by these examples",
        box=SIMPLE_HEAD,
    )
    middle = options.inner(len(fitted.by_layer))
    prompts, answers = found.prompts.mean(0), found.tokens.mean(0)
    for layer, share in enumerate(fitted.by_layer):
        rows.add_row(
            str(layer),
            f"{prompts[2 * layer + 1]:.4f}",
            f"{answers[2 * layer + 1]:.4f}",
            f"{prompts[2 * layer]:.4f}",
            f"{share:.0%}" if layer in middle else "always runs",
        )
    return rows
