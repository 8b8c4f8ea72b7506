# SPDX-License-Identifier: Apache-2.0
"""What commands that run a model on a data set share: their options, and the run itself."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from vllm_adaskip.bundled import is_bundled
from vllm_adaskip.lab.data.items import Item
from vllm_adaskip.lab.data.sources import load_items
from vllm_adaskip.lab.evaluation import settings as known
from vllm_adaskip.lab.evaluation.manifest import (
    asking,
    metrics_of,
    new_manifest,
    start_or_resume,
)
from vllm_adaskip.lab.evaluation.results import (
    Answer,
    Manifest,
    Question,
    Results,
    Setting,
    Timing,
)
from vllm_adaskip.lab.models import model_path

if TYPE_CHECKING:
    from vllm_adaskip.lab.evaluation.doubt import Doubts
    from vllm_adaskip.lab.evaluation.summary import Summary

#: Shares of compute to compare where the user names none.
BUDGETS = [0.9, 0.75, 0.6]
#: Times the rounds that were asked for, at most, where times vary.
MORE = 3
#: Of every progress bar: what, how much of it, the time so far, and the time that is left.
COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TextColumn("left"),
    TimeRemainingColumn(),
)
console = Console(stderr=True)

Model = Annotated[
    str,
    typer.Option(help="Path, hub id, or smollm2 (adaskip get); the bundled model if left out."),
]
Data = Annotated[
    str,
    typer.Option(
        help="bundled, bundled:sum,hop, lm-eval:gsm8k, or a file: JSON lines, a JSON array, CSV, "
        "Parquet."
    ),
]
Questions = Annotated[
    str, typer.Option(help="Your questions, as `adaskip eval` reads them; else built-in ones.")
]
Columns = Annotated[
    str,
    typer.Option(help="Of a file: those of prompts and references, question,answer; no others."),
]
ApplyChatTemplate = Annotated[
    bool,
    typer.Option(
        "--apply-chat-template",
        help="Prompts are users' messages; of lm-eval tasks as the harness does it.",
    ),
]
LmEvalPath = Annotated[
    Path | None, typer.Option(help="Folder of lm-evaluation-harness tasks of your own.")
]
Limit = Annotated[
    int, typer.Option(min=1, help="Items of each task; of lm-eval tasks the first, as they come.")
]
Metric = Annotated[
    str,
    typer.Option(help="Of items that name none and have no choices; lm-eval tasks bring theirs."),
]
Methods = Annotated[list[str] | None, typer.Option("--method", help="Methods to compare.")]
Options = Annotated[str, typer.Option(help="The methods' own options, as JSON.")]
Profiles = Annotated[
    list[str] | None, typer.Option("--profile", help="Profiles to compare: folders or hub ids.")
]
Families = Annotated[
    list[str] | None,
    typer.Option("--plans", help="Families of fixed plans: uniform, random, exit."),
]
PromptExits = Annotated[
    list[int] | None,
    typer.Option("--prompt-exit", help="Prompts of which so many layers run (docs/prompts.md)."),
]
PromptTail = Annotated[int, typer.Option(min=1, help="Their last tokens, which run everything.")]
Budgets = Annotated[
    list[float] | None,
    typer.Option("--max-compute", help="Largest shares of compute to keep, in (0, 1]."),
]
Targets = Annotated[
    list[float] | None,
    typer.Option("--target-skip", help="Of profiles: shares of layers left out on average."),
]
MaxTokens = Annotated[
    int,
    typer.Option(min=1, help="Tokens of an answer (lm-eval tasks set theirs), and of a timed one."),
]
Rounds = Annotated[int, typer.Option(min=0, help="Timed rounds of each setting.")]
Batch = Annotated[int, typer.Option(min=1, help="Sequences in a timed batch.")]
MaxModelLen = Annotated[int, typer.Option(min=8, help="vLLM's, for its KV cache.")]
EnforceEager = Annotated[
    bool, typer.Option("--enforce-eager", help="vLLM's: run and time everything uncompiled.")
]
Seed = Annotated[int, typer.Option(help="Of drawn items and random plans.")]


@contextmanager
def plain_errors(
    stopped: str = "stopped; what was measured is kept, the same command goes on",
) -> Iterator[None]:
    """End the command with an error's message alone where the message says what to do.

    ``stopped`` is said after Ctrl-C.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        extras = {"lm_eval": "lm-eval", "peft": "fit", "datasets": "fit", "gguf": "get"}
        extra = extras.get(missing, "eval")
        console.print(f"error: {error}; install vllm-adaskip[{extra}]", style="red", markup=False)
        raise typer.Exit(2) from None
    except (ValueError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        console.print(stopped)
        raise typer.Exit(130) from None


def asked(
    data: str,
    limit: int,
    seed: int,
    metric: str,
    lm_eval_path: Path | None,
    model: str | None = None,
    columns: str = "",
    apply_chat_template: bool = False,
) -> tuple[list[Item], dict[str, Any]]:
    """Read the items; also give what a manifest says of them.

    ``model``: whose chat template is applied, "" for the bundled one's; None: no messages.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # others' bars, read when tqdm is imported
    items = load_items(
        data,
        limit=limit,
        seed=seed,
        metric=metric,
        lm_eval_path=lm_eval_path,
        model=None if model is None else model_path(model),
        columns=named_columns(columns),
        apply_chat_template=apply_chat_template,
    )
    source: dict[str, Any] = {"source": data, "limit": limit, "items": len(items)}
    if lm_eval_path is not None:
        source["lm_eval_path"] = str(lm_eval_path)
    if columns:
        source["columns"] = columns
    if apply_chat_template:
        source["chat_template"] = True
    return items, source


def questions(
    path: str, data: str, limit: int, seed: int, columns: str, apply_chat_template: bool
) -> tuple[list[Item], dict[str, Any]]:
    """Return the user's items, or where none are named the built-in ones; else as `asked`."""
    if data:
        return asked(data, limit, seed, "exact_match", None, path, columns, apply_chat_template)
    if columns or apply_chat_template:
        raise ValueError("--columns and --apply-chat-template go with --data")
    from vllm_adaskip.lab.scan.answers import everyday

    items = everyday(path)[:limit]
    return items, {"source": "built-in prompts", "limit": limit, "items": len(items)}


def named_columns(text: str) -> tuple[str, str] | None:
    """Read ``--columns``; None if the user names none."""
    if not text:
        return None
    names = [name.strip() for name in text.split(",")]
    if len(names) != 2 or not all(names):
        raise ValueError(f"--columns {text!r:.80}; allowed: two names, PROMPT,REFERENCE")
    return names[0], names[1]


def described(model: str, data: dict[str, Any], seed: int, **engine: Any) -> Manifest:
    """Describe the run that starts now, with no settings yet; ``engine``: vLLM's options."""
    path = model_path(model)
    if is_bundled(path):  # too small to share a step among threads
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    return new_manifest(
        command=" ".join(["adaskip", *sys.argv[1:]]),
        model=path,
        data=data,
        engine=engine,
        settings=[],
        seed=seed,
    )


def in_this_process() -> None:
    """Have vLLM run here, so that engines die with the command; unless the user wants otherwise.

    To be called before vLLM is imported.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def loaded(path: str, device: str = "auto") -> Any:
    """Load a model in transformers: as stored on a GPU, float32 on a CPU.

    Raises:
        ValueError: no such device.

    """
    import torch
    from transformers import AutoModelForCausalLM

    name = device
    if device == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(name)
        dtype = torch.float32 if where.type == "cpu" else "auto"
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval().to(where)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device!r:.80}: {reason}; allowed: auto, cpu, cuda") from None


def serve_command(model: str, profile: str) -> str:
    """Return the command that serves a profile."""
    serve = f"vllm serve --model {shlex.quote(model)} --plugin adaskip"
    return f"{serve} --additional-config.adaskip.profile {shlex.quote(profile)}"


def candidates(
    num_layers: int,
    families: Sequence[str] | None,
    methods: Sequence[str] | None,
    options: str,
    budgets: Sequence[float] | None,
    draws: int,
    seed: int,
) -> list[Setting]:
    """Return families of plans and methods, each at each budget."""
    own = parsed(options, "--options", dict)
    shares = list(budgets or BUDGETS)
    for family in families or ():
        if family not in known.PLAN_FAMILIES:
            raise ValueError(f"--plans {family!r}; allowed: {', '.join(known.PLAN_FAMILIES)}")
    for share in shares:
        if not 0 < share <= 1:
            raise ValueError(f"--max-compute {share:g}; allowed: a number in (0, 1]")
    plans = known.plans(families or (), shares, num_layers, draws=draws, seed=seed)
    decided = (one for name in methods or () for one in known.decided(name, own, shares))
    return [*plans, *decided]


def profiles(
    names: Sequence[str] | None,
    budgets: Sequence[float] | None,
    targets: Sequence[float] | None,
    manifest: Manifest,
) -> Iterator[Setting]:
    """Return each profile by itself, and at the budgets and targets that the user names."""
    for name in names or ():
        yield from known.profiled(name, budgets or (), targets or (), manifest.fingerprint)


def parsed(text: str, option: str, kind: type) -> Any:
    """Read an argument that is JSON."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{option} {text!r:.80}: no JSON: {error.msg}") from None
    if not isinstance(value, kind):
        raise ValueError(f"{option} {text!r:.80}; allowed: a JSON {kind.__name__}")
    return value


def answer_and_time(
    results: Results,
    manifest: Manifest,
    settings: Sequence[Setting],
    items: Sequence[Item],
    *,
    max_tokens: int,
    rounds: int,
    batch: int,
) -> None:
    """Start a run under these settings, or do what is left of it, with a progress bar."""
    in_this_process()
    from vllm_adaskip.lab.evaluation.runner import Timed, Work, check, evaluate
    from vllm_adaskip.lab.scan.fits import family_shape

    check(settings, family_shape(manifest.model))
    _warn_of_single_tokens(manifest.model, items)
    told: dict[str, str | int | bool] = {"metric": metrics_of(items), "max_tokens": max_tokens}
    manifest = manifest.model_copy(update={"rounds": rounds})
    manifest = start_or_resume(results, asking(manifest, settings, items, **told))
    if len(results.read(Question)) < len(items):
        results.replace(Question, map(as_question, items))
    timed = Timed(batch, max_tokens, most=MORE * rounds)
    work = Work.left(results, settings, items, rounds, timed)
    with Progress(*COLUMNS, console=console) as progress:
        bar = progress.add_task("", total=work.steps)
        evaluate(
            results,
            manifest.model,
            settings,
            items,
            work,
            max_tokens=max_tokens,
            timed=timed,
            report=lambda what, done: progress.update(bar, description=what, advance=done),
            **manifest.engine,
        )


def as_question(item: Item) -> Question:
    """Return an item as it is stored beside its answers."""
    return Question(item=item.item, prompt=item.prompt, references=list(item.references))


def say_doubts(found: Doubts) -> None:
    """Print what speaks against the numbers of a run."""
    if found.all:
        console.print("what speaks against these numbers:", style="bold")
    for one in found.all:
        console.print(f"- {one.text}", markup=False, soft_wrap=True, highlight=False)


def _warn_of_single_tokens(model: str, items: Sequence[Item]) -> None:
    """Say where plans cannot tell: the first token of an answer comes of the prompt."""
    from vllm_adaskip.lab.evaluation.engine import forced_pairs, of_one_token

    if not any(map(forced_pairs, items)):
        return
    from transformers import AutoTokenizer

    if count := of_one_token(items, AutoTokenizer.from_pretrained(model)):
        console.print(
            f"warning: {count} of {len(items)} items have answers or choices of one token, which "
            "comes of the prompt, at full depth: they score under every plan as they do dense",
            style="yellow",
            markup=False,
            soft_wrap=True,
        )


def summarised(results: Results) -> Summary:
    """Work out the numbers of a run."""
    from vllm_adaskip.lab.evaluation.summary import summarise

    return summarise(results.manifest(), results.read(Answer), results.read(Timing))
