# SPDX-License-Identifier: Apache-2.0
"""``adaskip tune``: the setting that saves most within a loss, as a profile to serve with."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.console import Console
from rich.table import Table

from vllm_adaskip.classifiers import Scope, method_of
from vllm_adaskip.classifiers.hub import located
from vllm_adaskip.classifiers.methods import is_path
from vllm_adaskip.classifiers.profile import Profile
from vllm_adaskip.cli import run
from vllm_adaskip.engine.prompt_plan import TAIL
from vllm_adaskip.lab.evaluation.results import Answer, Manifest, Results, Setting
from vllm_adaskip.lab.evaluation.settings import distinct, shortened

if TYPE_CHECKING:
    from vllm_adaskip.lab.evaluation.summary import Summary
    from vllm_adaskip.lab.evaluation.tune import Trial


def tune(
    out: Annotated[Path, typer.Option(help="Folder for the profile; its runs go beside it.")],
    max_loss: Annotated[float, typer.Option(help="Largest loss of the mean score, 0.01.")] = 0.01,
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
    prompt_exit: run.PromptExits = None,
    prompt_tail: run.PromptTail = TAIL,
    budget: run.Budgets = None,
    target_skip: run.Targets = None,
    max_tokens: run.MaxTokens = 32,
    rounds: Annotated[int, typer.Option(min=3, help="Timed rounds of each setting.")] = 5,
    batch: run.Batch = 16,
    max_model_len: run.MaxModelLen = 512,
    enforce_eager: run.EnforceEager = False,
    seed: run.Seed = 0,
) -> None:
    """Pick method and budget so that a held-out half stays within the loss, with 95 % confidence.

    With no --method, --profile, --plans and --prompt-exit: method adaskip, uniform plans and
    early exit. If nothing qualifies, or something speaks against its numbers, nothing is written,
    and the exit status is 1.
    """
    if not (method or profile or plans or prompt_exit):
        method, plans = ["adaskip"], ["uniform", "exit"]
    with run.plain_errors():
        from vllm_adaskip.lab.evaluation.doubt import doubts
        from vllm_adaskip.lab.evaluation.recommend import serve_command
        from vllm_adaskip.lab.evaluation.tune import check, choose, halves, trials

        if not 0 <= max_loss < 1:
            raise ValueError(f"--max-loss {max_loss:g}; allowed: a number in [0, 1)")
        items, source = run.asked(
            data, limit, seed, metric, lm_eval_path, model, columns, apply_chat_template
        )
        first, second = halves(items, seed)
        check(first, second, max_loss)
        manifest = run.described(
            model, source, seed, max_model_len=max_model_len, enforce_eager=enforce_eager
        )
        settings = distinct([
            *run.candidates(manifest.num_layers, plans, method, options, budget, 1, seed),
            *shortened(prompt_exit or (), prompt_tail, manifest.num_layers),
            *run.profiles(profile, budget, target_skip, manifest),
        ])  # fmt: skip
        results = Results(out.with_name(f"{out.name}-runs"))
        run.answer_and_time(
            results, manifest, settings, items,
            max_tokens=max_tokens, rounds=rounds, batch=batch,
        )  # fmt: skip
        names = [one.name for one in settings[1:]]
        done = trials(results.read(Answer), names, first, second, max_loss)
        summary = run.summarised(results)
        against = doubts(summary, max_loss)
    speed = _speed(summary)
    sound = {name: time for name, time in speed.items() if not against.of(name)}
    best = choose(done, max_loss, sound)
    Console().print(_table(done, speed, max_loss, best, sound))
    if best is None:
        run.say_doubts(against)
        run.console.print(
            f"nothing surely stays within a loss of {max_loss:g} and saves time; no profile"
        )
        if not enforce_eager:
            run.console.print("vLLM ran dense steps compiled, others not; see --enforce-eager")
        raise typer.Exit(1)
    setting = next(one for one in settings if one.name == best.setting)
    write_profile(setting, best, manifest, speed, out)
    run.console.print(f"{best.setting} -> {out}; serve it with", style="bold")
    command = serve_command(manifest.model, manifest.engine)
    if is_path(setting.method):  # which no profile can name by itself
        command += f" --additional-config.adaskip.method {shlex.quote(setting.method)}"
    run.console.print(
        f"{command} --additional-config.adaskip.profile {shlex.quote(str(out))}",
        soft_wrap=True,
        markup=False,
    )


def decides_once(method: str, options: Mapping[str, Any]) -> bool:
    """Return whether a method decides a sequence's plan once, which is what a guard can judge."""
    scope = getattr(method_of(method).Options.model_validate(options), "scope", None)
    return scope not in get_args(Scope)


def write_profile(
    setting: Setting, trial: Trial, manifest: Manifest, speed: dict[str, float], out: Path
) -> None:
    """Write the profile that makes a server do what a setting did."""
    fixed = bool(setting.skip)
    options = {"skip": setting.skip} if fixed else dict(setting.options)
    if (origin := options.pop("profile", None)) is not None:
        source = located(str(origin))
        options = {**Profile.load(source).options, **options}
        shutil.copytree(source, out, dirs_exist_ok=True)  # its tensors
    figures = {
        "held_out_loss": trial.loss,
        "held_out_loss_bound_95": trial.bound,
        "compute_kept": trial.kept,
        "time_against_dense": speed.get(setting.name),
    }
    method = "static" if fixed else setting.method
    made = Profile(
        method=method,
        options=options,
        guard=method != "none" and decides_once(method, options),
        max_compute=1.0 if fixed else setting.budget,
        prompt=setting.prompt,
        model=manifest.model,
        fingerprint=manifest.fingerprint,
        metrics={name: value for name, value in figures.items() if value is not None},
    )
    made.save(out)


def _speed(summary: Summary) -> dict[str, float]:
    """Median time against dense, by setting."""
    return {
        one.name: one.speeds[summary.batch].median
        for one in summary.others
        if summary.batch in one.speeds
    }


def _table(
    done: list[Trial],
    speed: dict[str, float],
    max_loss: float,
    best: Trial | None,
    sound: Collection[str],
) -> Table:
    rows = Table(
        "setting", "loss, first half", "loss, held out", "95 % bound", "compute kept", "time", "",
        title=f"from the safest to the boldest; allowed loss {max_loss:g}",
    )  # fmt: skip
    for one in done:
        tested = one.loss is not None and one.bound is not None
        verdict = "not tested" if one.bound is None else "passes"
        if one.bound is not None and one.bound > max_loss:
            verdict = "fails; no bolder one is tested"
        elif one.setting not in sound:
            verdict += ", in doubt"
        rows.add_row(
            one.setting,
            f"{one.expected:+.3f}",
            f"{one.loss:+.3f}" if tested else "",
            f"{one.bound:.3f}" if tested else "",
            f"{one.kept:.0%}",
            f"{speed[one.setting]:.2f}" if one.setting in speed else "",
            "chosen" if one is best else verdict,
        )
    return rows
