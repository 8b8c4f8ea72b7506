# SPDX-License-Identifier: Apache-2.0
"""Tasks of lm-evaluation-harness: which can be asked under plans, and their prompts.

A prompt runs at full depth, so whatever is scored must be generated under the plan: answers, and
the choices and continuations whose log-probabilities a task reads. `harness_engine` has the
harness ask and score.
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

from vllm_adaskip.lab.data.chat import ChatTemplate
from vllm_adaskip.lab.data.items import HARNESS, DataError, Item

_GENERATES = "generate_until"
#: What may be asked; requests of multiple choice are of type ``loglikelihood``.
_OUTPUT_TYPES = (_GENERATES, "multiple_choice", "loglikelihood")
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
        chat: whether prompts go through the model's chat template.

    """

    name: str
    own: Any
    manager: Any
    limit: int | None
    metric: str
    way: str
    chat: bool = False


@dataclass(frozen=True, kw_only=True)
class HarnessItem(Item):
    """A document of a task, with the prompt that the harness makes of it.

    Attributes:
        longest: so many tokens an answer may have; 0 where none is generated freely.
        pairs: contexts with the continuations whose log-probabilities are read.

    """

    source: HarnessTask = field(repr=False, compare=False)
    document: int
    longest: int
    pairs: tuple[tuple[str, str], ...] = ()


def load_tasks(
    names: str, folder: Path | None, limit: int | None, template: ChatTemplate | None = None
) -> list[Item]:
    """Read tasks, and all tasks of groups, of the harness and of a folder of one's own.

    ``template``: that prompts go through, as the harness's ``--apply_chat_template`` does.

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
            _build_requests(own, limit, template)
            items += _items(name, own, manager, limit, template is not None)
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
    except ModuleNotFoundError as error:
        if error.name in (None, "lm_eval", "lm_eval.tasks"):
            raise
        raise DataError(
            f"{HARNESS}:{name} wants the package {error.name}, which is not installed; "
            f"lm_eval[{name.partition('_')[0]}] or lm_eval[tasks] has it"
        ) from error
    except Exception as error:
        lines = str(error).replace("*", "").strip().splitlines()
        what = f"{type(error).__name__}: {lines[0].strip() if lines else ''}".rstrip(": ")
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
        _check_type(each, own.OUTPUT_TYPE)
    return tasks


def _check_index(index: Mapping[str, Any], name: str) -> None:
    """Refuse a task, or a group with one, before data is fetched, where its file tells."""
    entry = index[name]
    config = entry.cfg or {"task": [*entry.tags]}  # a tag has no file
    _check_type(name, config.get("output_type"))
    members = config.get("task")
    for one in members if isinstance(members, list) else []:
        member = one if isinstance(one, str) else one.get("group") or one.get("task")
        if member in index:
            _check_index(index, member)


def _check_type(name: str, output_type: str | None) -> None:
    if output_type not in (None, *_OUTPUT_TYPES):
        raise DataError(
            f"{HARNESS}:{name} has output_type {output_type}; allowed: "
            f"{', '.join(_OUTPUT_TYPES)}. A rolling log-likelihood has no prompt: all of its text "
            "would have to be generated"
        )


def _build_requests(own: Any, limit: int | None, template: ChatTemplate | None) -> None:
    """Have a task make its requests, as ``simple_evaluate`` will."""
    own.set_fewshot_seed(FEWSHOT_SEED)
    if template is None:
        own.build_all_requests(limit=limit)
    else:
        own.build_all_requests(
            limit=limit,
            apply_chat_template=True,
            fewshot_as_multiturn=True,
            chat_template=template.of_harness,
        )


def _items(
    name: str, own: Any, manager: Any, limit: int | None, chat: bool
) -> Iterator[HarnessItem]:
    for mark, what in ("UNSAFE_CODE", "runs generated code"), ("MULTIMODAL", "is not text alone"):
        if getattr(own, mark, False):
            raise DataError(f"{HARNESS}:{name} {what}, which is not supported")
    documents: dict[int, list[Any]] = {}
    for one in own.instances:
        _check_type(name, one.request_type)
        documents.setdefault(one.doc_id, []).append(one)
    for requests in documents.values():
        requests.sort(key=lambda one: one.idx)
        generates = [one.request_type == _GENERATES for one in requests]
        if any(generates) and len(requests) > 1:
            raise DataError(f"{HARNESS}:{name} has several prompts for a document; allowed: one")
    references = {number: _references(own, one[0].doc) for number, one in documents.items()}
    metric, ways = _score(name, own, documents, references)
    task = HarnessTask(name, own, manager, limit, metric, ways[0], chat)
    for number, requests in documents.items():
        yield HarnessItem(
            item=f"{name}/{number}",
            task=name,
            references=references[number],
            metric=metric if len(ways) == 1 else f"{metric},{ways[0]}",
            source=task,
            document=number,
            **_asked(name, requests),
        )


def _asked(name: str, requests: Sequence[Any]) -> dict[str, Any]:
    """Return what an item asks: a prompt with the room for its answer, or pairs."""
    from lm_eval.models.utils import normalize_gen_kwargs

    first = requests[0]
    if first.request_type != _GENERATES:
        pairs = tuple((one.args[0], one.args[1]) for one in requests)
        if not all(continuation for _, continuation in pairs):
            raise DataError(f"{HARNESS}:{name} has an empty choice; allowed: texts")
        return {"prompt": pairs[0][0] or pairs[0][1], "longest": 0, "pairs": pairs}
    options = normalize_gen_kwargs(first.args[1])
    if options["do_sample"] and options.get("temperature", 1) > 0:
        raise DataError(f"{HARNESS}:{name} draws answers at random; allowed: do_sample: false")
    return {"prompt": first.args[0], "longest": options["max_gen_toks"]}


def _references(own: Any, document: Any) -> tuple[str, ...]:
    target = own.doc_to_target(document)
    targets = target if isinstance(target, list) else [target]
    if any(isinstance(one, int) for one in targets) and own.get_config("doc_to_choice") is not None:
        choices = own.doc_to_choice(document)
        targets = [
            choices[one] if isinstance(one, int) and 0 <= one < len(choices) else one
            for one in targets
        ]
    return tuple(map(str, targets)) or ("",)


def _score(
    name: str,
    own: Any,
    documents: Mapping[int, Sequence[Any]],
    references: Mapping[int, tuple[str, ...]],
) -> tuple[str, list[str]]:
    """Choose the metric, and list the ways of reading; by scoring right answers as a trial.

    A metric may not be a number until all answers are taken together, and its name may be the
    business of the task's own function: only what comes out tells. All documents are tried, so
    that what is missing for one of them is found before any model is loaded.
    """
    for number, requests in documents.items():
        for one in requests:
            answer = references[number][0] if one.request_type == _GENERATES else (-1.0, True)
            one.resps = [answer] * (one.repeats or 1)
    own.apply_filters()
    ways = list(own.instances[0].filtered_resps)
    more_is_better = own.higher_is_better()
    scores: Mapping[str, Any] = {}
    fit: list[str] | None = None
    for requests in documents.values():
        read = [one.filtered_resps[ways[0]] for one in requests]
        scores = own.process_results(requests[0].doc, read)
        usable = [
            metric
            for metric, score in scores.items()
            if more_is_better.get(metric) and isinstance(score, Real) and 0 <= float(score) <= 1
        ]
        fit = usable if fit is None else [metric for metric in fit if metric in usable]
    if fit:
        return fit[0], ways
    raise DataError(
        f"{HARNESS}:{name} has metrics {', '.join(map(str, scores)) or 'none'}; allowed: at least "
        "one that gives each answer a number in [0, 1], with higher_is_better: true"
    )
