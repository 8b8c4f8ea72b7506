# SPDX-License-Identifier: Apache-2.0
"""What all of ``adaskip fit`` shares: options, examples and model, progress, how to go on."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from pydantic import BaseModel, ValidationError
from rich.progress import Progress

from vllm_adaskip.bundled import is_bundled
from vllm_adaskip.classifiers.base import MethodOptions
from vllm_adaskip.classifiers.profile import FILE, Profile, fingerprint
from vllm_adaskip.cli import run
from vllm_adaskip.cli.run import COLUMNS, console
from vllm_adaskip.lab.models import model_path

if TYPE_CHECKING:
    from vllm_adaskip.classifiers.plan import DecoderShape
    from vllm_adaskip.lab.fitting.samples import Sample
    from vllm_adaskip.lab.fitting.similarity import Similarities

Settings = TypeVar("Settings", bound=BaseModel)
fit = typer.Typer(help="Train what a method needs for one model, as a profile.")

Out = Annotated[Path, typer.Option(help="Folder for the profile; a stopped fit goes on.")]
Data = Annotated[
    str,
    typer.Option(
        help="bundled, bundled:sum,hop, hub:NAME, hub:NAME:SPLIT, hub:NAME:SPLIT:CONFIG, or a "
        "file (JSON lines, a JSON array, CSV, Parquet), whose references are the answers."
    ),
]
PromptColumn = Annotated[str, typer.Option(help="Of a data set of the hub, or of a file.")]
AnswerColumn = Annotated[str, typer.Option(help="Of a data set of the hub, or of a file.")]
Limit = Annotated[int, typer.Option(min=1, help="Examples of each task.")]
Batch = Annotated[int, typer.Option(min=1, help="Examples in one step.")]
Seed = Annotated[int, typer.Option(help="Of all that is drawn.")]
Answers = Annotated[
    str, typer.Option(help="own: the model answers the prompts first; given: the references.")
]
AnswerTokens = Annotated[int, typer.Option(min=8, help="Of an own answer, at most.")]
Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1.")]


@dataclass(frozen=True)
class Subject:
    """The model that is fitted, not loaded yet, and the examples as its tokens.

    Attributes:
        name: as the user wrote it; ``bundled`` where nothing was written.
        path: what transformers loads.
        commit: of a hub id; None for a folder.
        config: the model's, as a dict.

    """

    name: str
    path: str
    commit: str | None
    config: dict[str, Any]
    samples: list[Sample]


def subject(
    model: str,
    data: str,
    columns: tuple[str, str],
    limit: int,
    batch: int,
    seed: int,
    *,
    apply_chat_template: bool = False,
) -> Subject:
    """Read the examples, then the model's config and tokenizer; refuse what cannot be used.

    Raises:
        ValueError: the message names the example, and its file and line if there are any.

    """
    # Read when torch and tqdm are imported. The bundled model is too small to share a step.
    os.environ.setdefault("TQDM_DISABLE", "1")
    path = model_path(model)
    if is_bundled(path):
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    from vllm_adaskip.lab.data.examples import load_examples

    items = load_examples(
        data, limit=limit, seed=seed, batch=batch, columns=columns, model=path,
        apply_chat_template=apply_chat_template,
    )  # fmt: skip
    from transformers import AutoConfig, AutoTokenizer

    from vllm_adaskip.lab.data.tokens import end_tokens
    from vllm_adaskip.lab.digest import commit_of
    from vllm_adaskip.lab.fitting.samples import sample

    config = AutoConfig.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    ends = end_tokens(path, tokenizer)
    samples = [sample(item, tokenizer, ends) for item in items]
    allowed = getattr(config.get_text_config(), "max_position_embeddings", None)
    for item, one in zip(items, samples, strict=True):
        if allowed is not None and len(one.ids) > allowed:
            raise ValueError(f"{item.item}: {len(one.ids)} tokens; the model allows {allowed}")
    return Subject(model or "bundled", path, commit_of(config), config.to_dict(), samples)


def check_answers(named: str) -> None:
    """Refuse answers of no kind that there is (`ValueError`)."""
    if named not in ("own", "given"):
        raise ValueError(f"--answers {named!r:.80}; allowed: own, given")


def answered(one: Subject, answers: str, tokens: int, out: Path) -> list[Sample]:
    """Return the examples, with the model's own answers if these are wanted, kept in the folder.

    Raises:
        ValueError: hardly any prompt got an answer.

    """
    from vllm_adaskip.lab.fitting.own_answers import answered

    samples = one.samples
    if answers == "own":
        samples = answered(one.path, samples, tokens, out / "answers.safetensors")
    if len(samples) < 2:
        raise ValueError(f"--limit: {len(samples)} answers; allowed: 2 or more")
    return samples


def loaded(one: Subject, device: str) -> Any:
    """Load the model: as stored on a GPU, float32 on a CPU."""
    model = run.loaded(one.path, device)
    model.name_or_path = one.name  # what an adapter says that it is for
    return model


def begins(
    out: Path, method: str, one: Subject, data: str, told: Mapping[str, Any], made: str = FILE
) -> bool:
    """Write down what a fit is told; False if the folder has the file that it makes already.

    Raises:
        ValueError: the folder has another fit.

    """
    from vllm_adaskip.lab.digest import of_model
    from vllm_adaskip.lab.fitting.resume import digest, start_or_resume

    facts = {
        "fit": method,
        "model": one.name,
        "fingerprint": fingerprint(one.config),
        "model files": of_model(one.path, one.commit),
        "data": data,
        "examples": digest(one.samples),
    }
    start_or_resume(out, {**facts, **told})
    return not (out / made).exists()


def save(out: Path, method: str, one: Subject, options: MethodOptions, **others: Any) -> None:
    """Write the profile; ``others`` are of `Profile`."""
    Profile(
        method=method,
        options=options.model_dump(exclude_defaults=True),
        model=one.name,
        fingerprint=fingerprint(one.config),
        **others,
    ).save(out)


def checked(kind: type[Settings], **told: Any) -> Settings:
    """Return settings made of what the user set; call it before anything heavy is loaded.

    Raises:
        ValueError: the message names the option that was wrong.

    """
    try:
        return kind.model_validate(told)
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        option = str(wrong["loc"][-1]).replace("_", "-")
        raise ValueError(f"--{option} {wrong['input']!r:.80}: {wrong['msg']}") from None


@contextmanager
def progress(steps: int) -> Iterator[Callable[[str, int], None]]:
    """Show a bar; return what is told what is being done, and how many more steps are.

    Where nobody sees a bar, as in a log, it prints a line for every twentieth of the steps.
    """
    with Progress(*COLUMNS, console=console) as shown:
        bar = shown.add_task("", total=steps)
        (task,) = shown.tasks

        def report(what: str, done: int) -> None:
            before = int(20 * task.completed / steps)
            shown.update(bar, description=what, advance=done)
            if not console.is_terminal and int(20 * task.completed / steps) > before:
                left = task.time_remaining
                told = "" if left is None else f", {left / 60:.0f} minutes left"
                console.print(f"{what}: {int(task.completed)} of {steps}{told}", highlight=False)

        yield report


def measured(
    one: Subject,
    batch: int,
    device: str,
    check: Callable[[DecoderShape], None] = lambda shape: None,
) -> tuple[Similarities, DecoderShape]:
    """Load a model, unless `check` refuses its shape, and measure its sub-layers' similarities."""
    from vllm_adaskip.lab.fitting.similarity import similarities
    from vllm_adaskip.lab.fitting.sub_layers import decoder_shape

    with progress(len(one.samples)) as report:
        report("loading the model", 0)
        model = loaded(one, device)
        check(shape := decoder_shape(model))
        found = similarities(model, one.samples, batch, lambda done: report("measuring", done))
    return found, shape


def how_to_go_on(one: Subject, out: Path) -> None:
    """Print how to serve the profile, and how to measure it."""
    profile = shlex.quote(str(out))
    named = "" if one.name == "bundled" else f"--model {shlex.quote(one.name)} "
    lines = {
        f"profile: {out}; serve it with": run.serve_command(one.path, str(out)),
        "measure it with": f"adaskip eval {named}--profile {profile} --out {profile}-eval",
    }
    for what, command in lines.items():
        console.print(what, style="bold", markup=False, soft_wrap=True)
        console.print(command, markup=False, soft_wrap=True, highlight=False)
