# SPDX-License-Identifier: Apache-2.0
"""``adaskip ablate first``: what in FiRST does the work, as a table and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_adaskip.classifiers.plan import SkipPlan
from vllm_adaskip.classifiers.profile import FILE, Profile, fingerprint
from vllm_adaskip.cli import fit, run
from vllm_adaskip.cli.ablate import Out, compare, fitted

if TYPE_CHECKING:
    from vllm_adaskip.classifiers.first.ablate import Fits

#: Shares of layers left out that are compared where the user names none.
TARGETS = [0.15, 0.25, 0.4]
#: Prompts that codebooks are made for and thresholds set by, here.
PROMPTS = 450
#: Held-back examples on which fixed plans are searched.
SEARCHED = 90


def first(
    out: Out,
    model: run.Model = "",
    train_data: fit.Data = "bundled",
    data: run.Data = "bundled",
    limit: run.Limit = 100,
    seeds: Annotated[int, typer.Option(min=1, help="Fits of the routers.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Updates of the routers.")] = 300,
    lora_steps: Annotated[int, typer.Option(min=1, help="Updates of LoRA weights.")] = 200,
    target_skip: run.Targets = None,
    max_tokens: run.MaxTokens = 32,
    max_model_len: run.MaxModelLen = 512,
    enforce_eager: run.EnforceEager = False,
    seed: run.Seed = 0,
) -> None:
    """Routers against random plans and the best fixed ones, with LoRA and LoRA alone.

    And ways to reduce scores, codebook sizes, several seeds. Fits what it needs, measures all
    through the real engine, and writes ablation.png and report.html beside the results.
    """
    with run.plain_errors():
        from vllm_adaskip.classifiers.first.ablate import settings

        targets = sorted(target_skip or TARGETS)
        items, source = run.asked(data, limit, seed, "exact_match", None, model)
        manifest = run.described(
            model, source, seed, max_model_len=max_model_len, enforce_eager=enforce_eager
        )
        _fit_all(out, model, train_data, seeds, steps, lora_steps)
        counts = [round(target * manifest.num_layers) for target in targets]
        fits, fixed = _derived(out, model, train_data, seeds, lora_steps, counts)
        compared = settings(fits, fixed, targets, manifest.num_layers)
        compare(out, manifest, compared, items, max_tokens)


def _fit_all(out: Path, model: str, data: str, seeds: int, steps: int, lora_steps: int) -> None:
    """Fit routers for each seed, and with LoRA for the first; each a process, as of a user."""
    named = ["--model", model] if model else []
    fits = [(f"routers-{seed}", seed, 0) for seed in range(seeds)]
    for name, seed, adapted in (*fits, ("lora-0", 0, lora_steps)):
        told = ["--data", data, "--seed", seed, *named]
        fitted(out / name, "first", [*told, "--steps", steps, "--lora-steps", adapted])


def _derived(
    out: Path, model: str, data: str, seeds: int, lora_steps: int, counts: Sequence[int]
) -> tuple[Fits, dict[int, list[int | str]]]:
    """Make what is derived from the fits: variants, LoRA alone, and fixed plans."""
    from vllm_adaskip.classifiers.first.ablate import Fits, Scored, best_fixed, variants
    from vllm_adaskip.classifiers.first.fit.fitted import answer_tokens, held_back_of
    from vllm_adaskip.classifiers.first.fit.routing import prompt_scores
    from vllm_adaskip.classifiers.first.method import FirstOptions
    from vllm_adaskip.classifiers.first.routers import Routers
    from vllm_adaskip.lab.fitting.quality import PlanLoss

    subject = fit.subject(model, data, ("prompt", "answer"), 500, 16, 0)
    loaded: Any = fit.loaded(subject, "auto").requires_grad_(False)
    held_back, training = held_back_of(subject.samples)
    layers, hidden = loaded.config.num_hidden_layers, loaded.config.hidden_size
    routers = Routers.load(out / "routers-0", layers, hidden)
    options = FirstOptions.model_validate(Profile.load(out / "routers-0").options)

    def scored(reduce: Any) -> Any:
        method = options.model_copy(update={"reduce": reduce})
        return tuple(
            (prompt_scores(loaded, routers, method, some, 16), answer_tokens(some))
            for some in (training[:PROMPTS], held_back[:PROMPTS])
        )

    score: Scored = scored
    with run.console.status("scoring prompts for other ways to reduce, other codebooks"):
        made = variants(out / "routers-0", score, out / "variants")
    with run.console.status("searching for the best fixed plans"):
        answers = PlanLoss(loaded, held_back[:SEARCHED], 16)

        def loss(left_out: Sequence[int]) -> float:
            return answers(SkipPlan.parse([*left_out], layers))

        fixed = best_fixed(loss, counts, layers)
    tuned = _tuned(out / "lora-alone", subject, loaded, training, lora_steps)
    routed = [out / f"routers-{seed}" for seed in range(seeds)]
    return Fits(routed, out / "lora-0", tuned, made), fixed


def _tuned(
    out: Path, subject: fit.Subject, model: Any, training: Sequence[Any], steps: int
) -> Path:
    """Train LoRA with nothing skipped, as a profile without a method."""
    from vllm_adaskip.classifiers.first.fit.lora import no_skipping, train_lora
    from vllm_adaskip.lab.fitting.training import adapt, save_adapter

    if (out / FILE).exists():
        return out
    out.mkdir(parents=True, exist_ok=True)
    adapted = adapt(model, 8, 0)
    with fit.progress(steps) as report:
        train_lora(
            model, training, no_skipping, steps=steps, batch=16, rate=1e-3, seed=0,
            checkpoint=out / "lora.checkpoint", made=lambda done: report("LoRA alone", done),
        )  # fmt: skip
    save_adapter(adapted, out)
    (out / "lora.checkpoint").unlink()
    Profile(method="none", model=subject.name, fingerprint=fingerprint(subject.config)).save(out)
    return out
