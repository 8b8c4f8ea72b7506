# SPDX-License-Identifier: Apache-2.0
"""``adaskip fit heal``: teaches a model to say under plans what it says whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vllm_adaskip.classifiers.plan import SkipPlan
from vllm_adaskip.classifiers.profile import ADAPTER, Profile
from vllm_adaskip.cli import fit, run
from vllm_adaskip.cli.run import ApplyChatTemplate, Model, plain_errors

if TYPE_CHECKING:
    from vllm_adaskip.lab.fitting.heal import Healed, HealSettings, Rung


def heal(
    out: fit.Out,
    model: Model = "",
    skip: Annotated[
        list[str] | None,
        typer.Option(help="A plan as JSON, [5, 6]; several, from the one that is the default on."),
    ] = None,
    profile: Annotated[
        str, typer.Option(help="A profile of method static, whose plans are healed.")
    ] = "",
    prompt_exit: Annotated[
        int, typer.Option(help="Layers that prompts run (docs/prompts.md); 0: all.")
    ] = 0,
    prompt_tail: Annotated[
        int, typer.Option(min=1, help="Last tokens of a prompt, which run everything.")
    ] = 16,
    early_exit: Annotated[
        list[int] | None,
        typer.Option(help="First layers that shall say what all do, as for drafts; several."),
    ] = None,
    data: fit.Data = "bundled",
    prompt_column: fit.PromptColumn = "prompt",
    answer_column: fit.AnswerColumn = "answer",
    apply_chat_template: ApplyChatTemplate = False,
    limit: fit.Limit = 500,
    answers: fit.Answers = "own",
    tokens: fit.AnswerTokens = 128,
    steps: Annotated[int, typer.Option(help="Updates.")] = 600,
    batch: fit.Batch = 16,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-3,
    rank: Annotated[int, typer.Option(help="Rank of the LoRA weights.")] = 32,
    adapter: Annotated[
        str,
        typer.Option(
            help="planned: for tokens that leave something out; merged: for all, as --early-exit "
            "needs it. Default: planned where it can be.",
        ),
    ] = "",
    whole: Annotated[
        float, typer.Option(help="Of --adapter merged: share of training with nothing left out.")
    ] = 0.25,
    seed: fit.Seed = 0,
    device: fit.Device = "auto",
) -> None:
    """Train LoRA by which MODEL says under plans what it says whole; write a profile with both.

    The judge is MODEL itself, so no reference need be right. A stopped fit goes on with the same
    command.
    """
    with plain_errors():
        fit.check_answers(answers)
        asked = [bool(skip), bool(profile), bool(early_exit)]
        if sum(asked) > 1 or not any([*asked, prompt_exit]):
            raise ValueError(
                "what shall be healed? allowed: one of --skip, --profile and --early-exit, and "
                "--prompt-exit alone or beside them"
            )
        if early_exit and adapter == "planned":
            raise ValueError("--adapter planned: not with --early-exit; allowed: merged")
        one = fit.subject(
            model, data, (prompt_column, answer_column), limit, batch, seed,
            apply_chat_template=apply_chat_template,
        )  # fmt: skip
        from vllm_adaskip.lab.fitting.heal import HealSettings  # and torch, which `subject` sets up

        settings = fit.checked(
            HealSettings, steps=steps, batch=batch, lr=lr, rank=rank, whole=whole, seed=seed,
            adapter=adapter or ("merged" if early_exit else "planned"),
        )  # fmt: skip
        served = _served(one, skip or (), profile, early_exit or (), prompt_exit, prompt_tail)
        rungs = _rungs(served, early_exit or (), one.config["num_hidden_layers"])
        told = {
            **settings.model_dump(), "answers": answers, "tokens": tokens,
            "plans": [str(rung) for rung in rungs],
        }  # fmt: skip
        if fit.begins(out, "heal", one, data, told):
            done = _fit(out, one, rungs, settings, answers, tokens, device)
            made = {"metrics": _metrics(done, settings), "adapter": settings.adapter}
            served.model_copy(update=made).save(out)
            Console().print(table(done))
            for rung in done.worse:
                run.console.print(f"the adapter makes it worse: {rung}", style="bold red")
        _how_to_go_on(one, out, early_exit or ())


def _served(
    one: fit.Subject,
    skip: Sequence[str],
    profile: str,
    early_exit: Sequence[int],
    prompt_exit: int,
    prompt_tail: int,
) -> Profile:
    """Return the profile that is healed, as it will be served; `ValueError`: it cannot be."""
    from vllm_adaskip.classifiers.hub import located
    from vllm_adaskip.classifiers.profile import fingerprint
    from vllm_adaskip.lab.scan.fits import family_shape

    own: dict[str, Any] = {"model": one.name, "fingerprint": fingerprint(one.config)}
    if prompt_exit:
        own["prompt"] = {"exit": prompt_exit, "tail": prompt_tail}
    if profile:
        folder = located(profile)
        earlier = Profile.load(folder)
        earlier.check_model(one.config)
        if earlier.method != "static" or (folder / ADAPTER).exists():
            has = "an adapter" if (folder / ADAPTER).exists() else f"method {earlier.method!r}"
            raise ValueError(
                f"--profile {profile}: has {has}; allowed: method 'static' without an adapter "
                "(for 'first', fit first --lora-steps trains one)"
            )
        return earlier.model_copy(update=own)
    if not skip:
        return Profile(method="none", **own)
    plans = [run.parsed(text, "--skip", list) for text in skip]
    options = {"skip": plans[0], **({"ladder": plans[1:]} if plans[1:] else {})}
    shape = family_shape(one.path)
    budget = SkipPlan.parse(plans[0], shape.num_layers).share(shape)
    return Profile(method="static", options=options, max_compute=budget, **own)


def _rungs(served: Profile, early_exit: Sequence[int], num_layers: int) -> list[Rung]:
    """Return what is healed of a profile, and for drafts."""
    from vllm_adaskip.engine.prompt_plan import PromptPlan, exit_plan
    from vllm_adaskip.lab.fitting.heal import Rung

    prompt = PromptPlan.of_options(served.prompt, num_layers) if served.prompt else None
    options = served.options
    listed = [options.get("skip", []), *options.get("ladder", [])]
    plans = [SkipPlan.parse(each, num_layers) for each in listed]
    plans += [exit_plan(layers, num_layers) for layers in early_exit]
    rungs = [Rung(plan, prompt) for plan in dict.fromkeys(plans)]
    if len(rungs) > 1 or prompt is None:
        rungs = [rung for rung in rungs if not rung.plan.is_dense]
    if not rungs or rungs[0].is_whole:
        raise ValueError("nothing is left out, so there is nothing to heal")
    return rungs


def _fit(
    out: Path,
    one: fit.Subject,
    rungs: Sequence[Rung],
    settings: HealSettings,
    answers: str,
    tokens: int,
    device: str,
) -> Healed:
    from vllm_adaskip.lab.fitting.heal import CHECKPOINT, heal
    from vllm_adaskip.lab.fitting.training import draw_curves

    samples = fit.answered(one, answers, tokens, out)
    with fit.progress(settings.steps) as report:
        report("loading the model", 0)
        model = fit.loaded(one, device).bfloat16()
        done = heal(model, samples, rungs, settings, out, report)
    draw_curves({"healing": done.curve}, out, "nats a token; share of tokens")
    (out / CHECKPOINT).unlink(missing_ok=True)
    return done


def _metrics(done: Healed, settings: HealSettings) -> dict[str, float | int | str]:
    """Return a profile's figures: of the first plan, and of nothing left out."""
    figures: dict[str, float | int | str] = {"steps": settings.steps, "rank": settings.rank}
    for name, place in (("", 0), (" whole", -1)):
        figures |= {
            f"divergence{name} before": round(done.before[place].divergence, 4),
            f"divergence{name}": round(done.after[place].divergence, 4),
            f"agreement{name} before": round(done.before[place].agreement, 4),
            f"agreement{name}": round(done.after[place].agreement, 4),
        }
    if done.worse:
        figures["worse with the adapter"] = "; ".join(map(str, done.worse))
    return figures


def table(done: Healed) -> Table:
    """Show how near each plan is to the whole model, before and after."""
    rows = Table(
        *("left out", "divergence before", "after", "agreement before", "after"),
        title="answers held back, each next token beside the whole model's as it was",
        caption="divergence in nats a token; agreement: share of tokens with the same likeliest",
        box=SIMPLE_HEAD,
    )
    for rung, old, new in zip(done.rungs, done.before, done.after, strict=True):
        rows.add_row(
            str(rung), f"{old.divergence:.4f}", f"{new.divergence:.4f}",
            f"{old.agreement:.1%}", f"{new.agreement:.1%}",
        )  # fmt: skip
    return rows


def _how_to_go_on(one: fit.Subject, out: Path, early_exit: Sequence[int]) -> None:
    fit.how_to_go_on(one, out)
    if early_exit:
        drafts = f"--additional-config.adaskip.draft.exit {early_exit[0]}"
        command = f"{run.serve_command(one.path, str(out))} {drafts}"
        run.console.print("draft with its first layers", style="bold")
        run.console.print(command, markup=False, soft_wrap=True, highlight=False)
