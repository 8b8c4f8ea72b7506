# SPDX-License-Identifier: Apache-2.0
"""``adaskip scan``: which layers can be left out, and whether it is worth it here."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.progress import Progress

from vllm_adaskip.cli import run
from vllm_adaskip.lab.evaluation.results import Manifest, Question, Results

if TYPE_CHECKING:
    from vllm_adaskip.classifiers.plan import DecoderShape
    from vllm_adaskip.lab.data.items import Item
    from vllm_adaskip.lab.fixed_plans import Unit
    from vllm_adaskip.lab.scan.scan import Found


def scan(
    out: Annotated[Path, typer.Option(help="Folder for all of it; a stopped scan goes on.")],
    model: Annotated[
        str, typer.Argument(help="Path or hub id; the bundled model if left out.")
    ] = "",
    data: run.Questions = "",
    columns: run.Columns = "",
    apply_chat_template: run.ApplyChatTemplate = False,
    limit: Annotated[int, typer.Option(min=8, help="Questions of each task, or built-in.")] = 32,
    unit: Annotated[
        str, typer.Option(help="What is left out one by one: sub-layer or layer.")
    ] = "sub-layer",
    agreement: Annotated[
        float, typer.Option(help="Share of answer tokens that must stay the whole model's.")
    ] = 0.95,
    prompt_exit: run.PromptExits = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 48,
    rounds: Annotated[int, typer.Option(min=3, help="Timed rounds of each plan.")] = 8,
    seed: run.Seed = 0,
) -> None:
    """Measure what each sub-layer of MODEL costs and saves on this machine; say what to leave out.

    The judge is the whole model itself: its own answers to your questions, so none need be right.
    Writes scan.html, scan.json and, if there is something to leave out, a profile. With
    --prompt-exit it says beside it how many layers prompts should run.
    """
    with run.plain_errors():
        if unit not in ("sub-layer", "layer"):
            raise ValueError(f"--unit {unit!r:.80}; allowed: sub-layer, layer")
        if not 0 < agreement < 1:
            raise ValueError(f"--agreement {agreement:g}; allowed: a number in (0, 1)")
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
        from vllm_adaskip.engine.prompt_plan import exit_plan
        from vllm_adaskip.lab.scan.fits import check_memory, family_shape, found_model

        path = found_model(model)
        shape = family_shape(path)
        for layers in prompt_exit or ():
            if exit_plan(layers, shape.num_layers).is_dense:
                most = shape.num_layers - 1
                raise ValueError(f"--prompt-exit {layers}: the whole model; allowed: 1 to {most}")
        check_memory(path)
        items, source = run.questions(path, data, limit, seed, columns, apply_chat_template)
        manifest = run.described(path, source, seed)
        found = _measured(
            Results(out), manifest, shape, items,
            unit=unit, bound=agreement, exits=prompt_exit or (), tokens=max_tokens, rounds=rounds,
        )  # fmt: skip
        _write(Results(out), found, model or "bundled", agreement)


def _measured(
    results: Results,
    manifest: Manifest,
    shape: DecoderShape,
    items: Sequence[Item],
    *,
    unit: str,
    bound: float,
    exits: Sequence[int],
    tokens: int,
    rounds: int,
) -> Found:
    """Measure all that an earlier scan of the folder has not."""
    from vllm_adaskip.lab.evaluation.manifest import asking, start_or_resume
    from vllm_adaskip.lab.scan.answers import tokenised

    prompts, longest = tokenised(items, manifest.model, tokens)
    start_or_resume(results, asking(manifest, [], items, max_tokens=tokens, scan_rounds=rounds))
    results.replace(Question, map(run.as_question, items))
    run.in_this_process()
    from vllm_adaskip.lab.scan.scan import Scan
    from vllm_adaskip.lab.scan.timing import engines

    with (
        Progress(*run.COLUMNS, console=run.console) as progress,
        engines(manifest.model, max_model_len=longest, skip_tokenizer_init=False) as started,
    ):

        def say(what: str, total: int) -> Callable[[], None]:
            for ended in progress.tasks:  # a search may end before its last turn
                progress.update(ended.id, total=ended.completed)
            bar = progress.add_task(what, total=total)
            return lambda: progress.advance(bar)

        one = Scan(
            results, partial(run.loaded, manifest.model), shape, started,
            unit=cast("Unit", unit), rounds=rounds, tokens=tokens, say=say,
        )  # fmt: skip
        return one.run(items, prompts, bound, exits)


def _write(results: Results, found: Found, model: str, bound: float) -> None:
    """Write the page, the figures and the profile, if there is one; say what was found."""
    from vllm_adaskip.engine.prompt_plan import TAIL
    from vllm_adaskip.lab.evaluation.recommend import switch_on_command
    from vllm_adaskip.lab.evaluation.settings import shortened
    from vllm_adaskip.lab.scan.page import page
    from vllm_adaskip.lab.scan.profile import as_json, save_profile

    manifest = results.manifest()
    (results.folder / "scan.json").write_text(as_json(found, manifest, model, bound))
    (results.folder / "scan.html").write_text(page(found, results, model, bound), encoding="utf-8")
    profile = save_profile(results.folder / "profile", found, manifest, model)
    echo = partial(run.console.print, markup=False, soft_wrap=True, highlight=False)
    echo(found.verdict.sentence + ".", style="bold")
    for one in found.verdict.doubts:
        echo(f"- {one.text}")
    echo(f"the page: {results.folder / 'scan.html'}")
    if profile:
        echo(f"profile: {profile}; serve it with", style="bold")
        echo(run.serve_command(manifest.model, str(profile)))
    else:
        echo("no profile is written")
    if found.prompts:
        echo(found.prompts.sentence + ".", style="bold")
        for one in found.prompts.doubts:
            echo(f"- {one.text}")
        if found.prompts.chosen:
            (setting,) = shortened([found.prompts.chosen], TAIL, manifest.num_layers)
            echo(switch_on_command(setting, manifest))
