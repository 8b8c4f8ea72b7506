# SPDX-License-Identifier: Apache-2.0
"""``adaskip fit adainfer``: learns from which layer on an answer does not change any more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vllm_adaskip.cli import fit
from vllm_adaskip.cli.run import Model, console, plain_errors

if TYPE_CHECKING:
    from vllm_adaskip.classifiers.adainfer.fit.cases import Cases
    from vllm_adaskip.classifiers.adainfer.fit.fitted import Fitted
    from vllm_adaskip.classifiers.adainfer.fit.quality import TaskExits
    from vllm_adaskip.classifiers.adainfer.fit.settings import AdaInferSettings


def adainfer(
    out: fit.Out,
    model: Model = "",
    data: fit.Data = "bundled",
    prompt_column: fit.PromptColumn = "prompt",
    answer_column: fit.AnswerColumn = "answer",
    limit: fit.Limit = 500,
    classifier: Annotated[str, typer.Option(help="svm, crf or threshold.")] = "svm",
    scope: Annotated[
        str,
        typer.Option(
            help="answer: requests for one token stop inside prefill; prompt: the prompt decides "
            "how deep its sequence decodes; token: each generated token."
        ),
    ] = "answer",
    agreement: Annotated[
        float,
        typer.Option(help="Share of those who stop whose answer has to stay the whole model's."),
    ] = 0.99,
    kernel: Annotated[str, typer.Option(help="rbf or linear; svm only.")] = "rbf",
    checks: Annotated[int, typer.Option(help="Most check layers; 0: all that pay.")] = 0,
    check_layers: Annotated[
        str, typer.Option(help="Look after these layers, 3,5,7, and no others.")
    ] = "",
    candidates: Annotated[
        bool,
        typer.Option("--candidates", help="Look at the logits of the examples' answers alone."),
    ] = False,
    batch: fit.Batch = 16,
    seed: fit.Seed = 0,
    device: fit.Device = "auto",
) -> None:
    """Fit AdaInfer's exits (arXiv 2403.02181), and write a profile.

    The model stays as it is. Prints what each layer's look is worth, and held-back answers.
    """
    with plain_errors():
        from vllm_adaskip.classifiers.adainfer.fit.settings import AdaInferSettings

        settings = fit.checked(
            AdaInferSettings,
            classifier=classifier,
            scope=scope,
            agreement=agreement,
            kernel=kernel,
            checks=checks,
            check_layers=_layers(check_layers),
            candidates=candidates,
            seed=seed,
        )
        one = fit.subject(model, data, (prompt_column, answer_column), limit, batch, seed)
        settings.check(one.config["num_hidden_layers"], len(one.samples))
        if fit.begins(out, "adainfer", one, data, settings.model_dump()):
            with fit.progress(len(one.samples)) as report:
                report("loading the model", 0)
                cases, cost, named = _watched(one, settings, batch, device, report)
                from vllm_adaskip.classifiers.adainfer.fit.fitted import fit_adainfer

                report("fitting", 0)
                fitted = fit_adainfer(cases, settings, cost)
            _write(out, one, settings, fitted, cases, named)
            Console().print(layers_table(fitted, cost, agreement))
            Console().print(tasks_table(fitted.tasks))
        fit.how_to_go_on(one, out)


def _layers(text: str) -> list[int] | None:
    try:
        return [int(part) for part in text.split(",")] if text else None
    except ValueError:
        raise ValueError(f"--check-layers {text!r:.80}; allowed: layers, such as 3,5,7") from None


def _watched(
    one: fit.Subject, settings: AdaInferSettings, batch: int, device: str, report: Any
) -> tuple[Cases, float, list[int] | None]:
    """Run the model on the examples; also give what a look costs, and the tokens looked at."""
    from vllm_adaskip.classifiers.adainfer.fit.cases import exit_candidates, exit_cases
    from vllm_adaskip.classifiers.adainfer.fit.check_layers import check_cost
    from vllm_adaskip.classifiers.adainfer.fit.head import FinalHead
    from vllm_adaskip.lab.fitting.sub_layers import decoder_shape

    model = fit.loaded(one, device)
    head = FinalHead(model, one.samples[0].ids)
    named = exit_candidates(one.samples, settings.scope) if settings.candidates else None
    vocabulary, hidden_size = head.weights
    tokens = vocabulary if named is None else len(named)
    cost = check_cost(decoder_shape(model), tokens, hidden_size)
    cases = exit_cases(
        *(model, head, one.samples, settings.scope, batch),
        lambda done: report("watching the model", done),
        named,
    )
    return cases, cost, named


def _write(
    out: fit.Out,
    one: fit.Subject,
    settings: AdaInferSettings,
    fitted: Fitted,
    cases: Cases,
    named: list[int] | None,
) -> None:
    """Write rule, training artefact, pictures, and at last the profile."""
    from vllm_adaskip.classifiers.adainfer.fit.plots import (
        COVERAGE,
        FEATURES,
        draw_coverage,
        draw_features,
    )
    from vllm_adaskip.classifiers.adainfer.method import AdaInferOptions

    fitted.rule.save(out)
    fitted.fit.save(out)
    draw_features(cases, fitted.chosen.layers, out)
    draw_coverage(fitted.looks, fitted.chosen, settings.classifier, out)
    looked_at = {} if named is None else {"vocabulary": "candidates", "candidates": named}
    options = AdaInferOptions.model_validate(
        {"scope": settings.scope, "classifier": settings.classifier, **looked_at}
    )
    fit.save(out, "adainfer", one, options, metrics=fitted.metrics)
    console.print(f"plots: {out / FEATURES}, {out / COVERAGE}", markup=False, soft_wrap=True)


def layers_table(fitted: Fitted, cost: float, asked: float) -> Table:
    """Show what each layer's look is worth, and whether all together are as sure as asked."""
    chosen = fitted.chosen
    rows = Table(
        *("layer", "settled", "would stop", "agreement of these", "looked after"),
        title="cross-validation, had everybody come there",
        caption=f"a check costs {cost:.3g} decoder layers; of all who stop {chosen.agreement:.2%} "
        f"agree, in the worst task {chosen.worst_task:.2%} of all; asked for: {asked:.2%}",
        box=SIMPLE_HEAD,
    )
    for one in fitted.layers:
        rows.add_row(
            str(one.layer),
            f"{one.settled:.1%}",
            f"{one.coverage:.1%}",
            f"{one.agreement:.2%}" if one.coverage else "",
            "yes" if one.is_checked else "",
        )
    return rows


def tasks_table(tasks: Sequence[TaskExits]) -> Table:
    """Show, by task, how deep held-back examples went, and what they lost."""
    rows = Table(
        *("task", "cases", "depth", "pruned", "as dense", "right dense", "right with exits"),
        title="held-back examples, fed with the right tokens",
        caption="depth: layers that run, on average; as dense: answers that stay the same",
        box=SIMPLE_HEAD,
    )
    for one in tasks:
        rows.add_row(
            one.task,
            str(one.cases),
            f"{one.depth:.2f}",
            f"{one.pruned:.1%}",
            f"{one.same:.1%}",
            f"{one.dense:.1%}",
            f"{one.right:.1%}",
        )
    return rows
