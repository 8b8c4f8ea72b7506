# SPDX-License-Identifier: Apache-2.0
"""Tasks of lm-evaluation-harness: which can be asked under plans, and their prompts.

Only those that generate: all others read log-probabilities of prompts, and a prompt runs at full
depth, so that no plan would change anything. `harness_engine` has the harness ask and score.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from numbers import Real
from pathlib import Path
from typing import Any

from vllm_adaskip.lab.data.items import HARNESS, DataError, Item

_GENERATES = "generate_until"
#: The harness's own default; of few-shot examples that a task draws.
FEWSHOT_SEED = 1234


@dataclass(frozen=True)
class HarnessTask:
    """A task that plans can be evaluated on.

    Attributes:
        own: the harness's ``Task``, with its data.
        manager: the harness's ``TaskManager``, which loaded it.
        limit: so many of its documents are asked, the first; None: all.
        metric: the task's first that gives an answer a score in [0, 1], more being better. Only
            one, because everything that reads answers wants one score an item.
        way: how an answer is read, the first of the task's filters.

    """

    name: str
    own: Any
    manager: Any
    limit: int | None
    metric: str
    way: str


@dataclass(frozen=True, kw_only=True)
class HarnessItem(Item):
    """A document of a task, with the prompt that the harness makes of it.

    Attributes:
        longest: so many tokens an answer may have.

    """

    source: HarnessTask = field(repr=False, compare=False)
    document: int
    longest: int


def load_tasks(names: str, folder: Path | None, limit: int | None) -> list[Item]:
    """Read tasks, and all tasks of groups, of the harness and of a folder of one's own.

    Raises:
        DataError: a task that is unknown, or that cannot be loaded, asked or scored.

    """
    if folder is not None and not folder.is_dir():
        raise DataError(f"--lm-eval-path {folder}: no such folder")
    manager = _manager(folder)
    tasks: dict[str, Any] = {}
    for name in map(str.strip, names.split(",")):
        with _named(name):
            tasks |= _load(manager, name)
    items: list[Item] = []
    for name, own in tasks.items():
        with _named(name):
            items += _items(name, own, manager, limit)
    return items


@cache  # it reads the harness's thousands of files
def _manager(folder: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder) if folder else None)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Say which task it was; tasks are others' programs, and anything may go wrong in them."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}".rstrip(": ")
        raise DataError(
            f"{HARNESS}:{name} cannot be loaded: {what}; is its data there, and not empty?"
        ) from error


def _load(manager: Any, name: str) -> dict[str, Any]:
    """Load a task, or those of a group."""
    if name not in manager.task_index:
        near = ", ".join(get_close_matches(name, manager.all_tasks)) or "none"
        raise DataError(
            f"{HARNESS}: no task {name!r:.80}; similar: {near}; `lm-eval ls tasks` lists all"
        )
    _check_index(manager.task_index, name)
    tasks: dict[str, Any] = manager.load([name])["tasks"]
    for each, own in tasks.items():
        _check_generates(each, own.OUTPUT_TYPE)
    return tasks


def _check_index(index: Mapping[str, Any], name: str) -> None:
    """Refuse a task, or a group with one, before data is fetched, where its file tells."""
    entry = index[name]
    config = entry.cfg or {"task": [*entry.tags]}  # a tag has no file
    _check_generates(name, config.get("output_type"))
    members = config.get("task")
    for one in members if isinstance(members, list) else []:
        member = one if isinstance(one, str) else one.get("group") or one.get("task")
        if member in index:
            _check_index(index, member)


def _check_generates(name: str, output_type: str | None) -> None:
    if output_type not in (None, _GENERATES):
        raise DataError(
            f"{HARNESS}:{name} has output_type {output_type}; allowed: {_GENERATES}. Others read "
            "log-probabilities of prompts, and a prompt runs at full depth under every plan"
        )


def _items(name: str, own: Any, manager: Any, limit: int | None) -> Iterator[HarnessItem]:
    from lm_eval.models.utils import normalize_gen_kwargs

    for mark, what in ("UNSAFE_CODE", "runs generated code"), ("MULTIMODAL", "is not text alone"):
        if getattr(own, mark, False):
            raise DataError(f"{HARNESS}:{name} {what}, which is not supported")
    own.set_fewshot_seed(FEWSHOT_SEED)
    own.build_all_requests(limit=limit)
    requests = own.instances
    for one in requests:
        _check_generates(name, one.request_type)
    if len({one.doc_id for one in requests}) < len(requests):
        raise DataError(f"{HARNESS}:{name} has several prompts for a document; allowed: one")
    references = [_references(own, one.doc) for one in requests]
    metric, ways = _score(name, own, references)
    task = HarnessTask(name, own, manager, limit, metric, ways[0])
    for one, right in zip(requests, references, strict=True):
        options = normalize_gen_kwargs(one.args[1])
        if options["do_sample"] and options.get("temperature", 1) > 0:
            raise DataError(f"{HARNESS}:{name} draws answers at random; allowed: do_sample: false")
        yield HarnessItem(
            item=f"{name}/{one.doc_id}",
            task=name,
            prompt=one.args[0],
            references=right,
            metric=metric if len(ways) == 1 else f"{metric},{ways[0]}",
            source=task,
            document=one.doc_id,
            longest=options["max_gen_toks"],
        )


def _references(own: Any, document: Any) -> tuple[str, ...]:
    target = own.doc_to_target(document)
    if isinstance(target, int) and own.get_config("doc_to_choice") is not None:
        target = own.doc_to_choice(document)[target]
    return tuple(map(str, target if isinstance(target, list) else [target])) or ("",)


def _score(name: str, own: Any, references: Sequence[tuple[str, ...]]) -> tuple[str, list[str]]:
    """Choose the metric, and list the ways of reading; by scoring a right answer as a trial.

    A metric may not be a number until all answers are taken together, and its name may be the
    business of the task's own function: only what comes out tells.
    """
    for one, right in zip(own.instances, references, strict=True):
        one.resps = [right[0]] * (one.repeats or 1)
    own.apply_filters()
    first = own.instances[0]
    ways = list(first.filtered_resps)
    scores = own.process_results(first.doc, [first.filtered_resps[ways[0]]])
    more_is_better = own.higher_is_better()
    for metric, score in scores.items():
        if more_is_better.get(metric) and isinstance(score, Real) and 0 <= float(score) <= 1:
            return metric, ways
    raise DataError(
        f"{HARNESS}:{name} has metrics {', '.join(map(str, scores)) or 'none'}; allowed: at least "
        "one that gives each answer a number in [0, 1], with higher_is_better: true"
    )
