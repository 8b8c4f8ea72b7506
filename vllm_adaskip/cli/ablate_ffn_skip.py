# SPDX-License-Identifier: Apache-2.0
"""``adaskip ablate ffn-skip``: FFN-SkipLLM against what it must beat, and without its parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from vllm_adaskip.classifiers.plan import SkipPlan
from vllm_adaskip.cli import fit, run
from vllm_adaskip.cli.ablate import Out, compare

if TYPE_CHECKING:
    from vllm_adaskip.lab.evaluation.results import Setting


def ffn_skip(
    out: Out,
    model: run.Model = "",
    train_data: fit.Data = "bundled",
    train_limit: Annotated[int, typer.Option(min=1, help="Training examples of each task.")] = 50,
    data: run.Data = "bundled",
    limit: run.Limit = 100,
    target_skip: Annotated[
        list[float] | None,
        typer.Option("--target-skip", help="Shares of MLPs left out."),
    ] = None,
    max_tokens: run.MaxTokens = 32,
    max_model_len: run.MaxModelLen = 512,
    enforce_eager: run.EnforceEager = False,
    seed: run.Seed = 0,
) -> None:
    """MLPs left out by prompt and by token, against fixed and random sets of them.

    Without cold regions, with warm-ups, over thresholds; AdaSkip and SLEB at equal compute.
    Measures all through the real engine; writes ablation.png beside the results.
    """
    with run.plain_errors():
        from vllm_adaskip.classifiers.ffn_skip.ablate import ASIDE, TARGETS

        targets = sorted(target_skip or TARGETS)
        if wrong := [target for target in targets if not 0 < target < 1]:
            raise ValueError(f"--target-skip {wrong[0]:g}; allowed: between 0 and 1")
        items, source = run.asked(data, limit, seed, "exact_match", None, model)
        manifest = run.described(
            model, source, seed, max_model_len=max_model_len, enforce_eager=enforce_eager
        )
        one = fit.subject(model, train_data, ("prompt", "answer"), train_limit, 16, seed)
        compared = _settings(one, targets)
        compare(
            out, manifest, compared, items, max_tokens,
            drawn=lambda group: not group.family.startswith(ASIDE),
        )  # fmt: skip


def _settings(one: fit.Subject, targets: list[float]) -> list[Setting]:
    """Measure the training examples and search for fixed sets, then give what is compared."""
    from vllm_adaskip.classifiers.ffn_skip.ablate import settings
    from vllm_adaskip.lab.fitting.greedy import greedy, trials
    from vllm_adaskip.lab.fitting.quality import PlanLoss
    from vllm_adaskip.lab.fitting.similarity import similarities
    from vllm_adaskip.lab.fitting.sub_layers import decoder_shape
    from vllm_adaskip.lab.fixed_plans import Entry, units

    loaded = fit.loaded(one, "auto").requires_grad_(False)
    shape = decoder_shape(loaded)
    searched = one.samples[:90]
    most = round(max(targets) * shape.num_layers)
    inner = range(1, shape.num_layers - 1)
    with fit.progress(len(one.samples) + 2 * trials(len(inner), most)) as report:
        found = similarities(loaded, one.samples, 16, lambda done: report("measuring", done))

        answers = PlanLoss(loaded, searched, 16)

        def loss(left_out: tuple[Entry, ...]) -> float:
            report("searching for fixed sets", 1)
            plan = SkipPlan.parse([*left_out], shape.num_layers)
            return answers(plan)

        mlps, layers = (
            list(greedy(loss, units(unit, inner), most))[-1].left_out for unit in ("mlp", "layer")
        )
    return settings(found, mlps, layers, shape, targets)
