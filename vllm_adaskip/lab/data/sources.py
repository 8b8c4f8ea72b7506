# SPDX-License-Identifier: Apache-2.0
"""Where questions come from: bundled tasks, lm-evaluation-harness tasks, JSON lines of prompts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_adaskip.lab.data.items import BUNDLED, HARNESS, DataError, Item
from vllm_adaskip.lab.data.metrics import METRICS
from vllm_adaskip.lab.data.rows import read_rows
from vllm_adaskip.lab.data.words import last_number


class Line(BaseModel):
    """One line of a data file: a prompt, and one reference or several."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(min_length=1)
    reference: str | None = None
    references: list[str] | None = None
    id: str | None = None
    task: str | None = None
    metric: str | None = None


def load_items(
    source: str,
    *,
    limit: int | None = None,
    seed: int = 0,
    metric: str = "exact_match",
    lm_eval_path: Path | None = None,
) -> list[Item]:
    """Read a data set.

    Args:
        source: ``bundled``, ``bundled:sum,hop``, ``lm-eval:gsm8k`` or the path of a file of JSON
            lines.
        limit: at most so many items of each task, drawn by ``seed``, of harness tasks the first;
            bundled: 100.
        seed: of the bundled questions, or of the draw.
        metric: of lines that name none.
        lm_eval_path: folder of more harness tasks.

    Raises:
        DataError: a file, a line, a task or a metric that cannot be used.

    """
    if source.startswith(f"{HARNESS}:"):
        from vllm_adaskip.lab.data.harness import load_tasks

        return load_tasks(source.partition(":")[2], lm_eval_path, limit)
    if lm_eval_path is not None:
        raise DataError(f"--lm-eval-path goes with --data {HARNESS}:TASK, not with {source!r:.80}")
    if source == BUNDLED or source.startswith(f"{BUNDLED}:"):
        return _bundled(source.partition(":")[2], 100 if limit is None else limit, seed)
    items = list(_from_file(Path(source), metric))
    if not items:
        raise DataError(f"{source}: no items; allowed: one JSON object a line, with a prompt")
    items = _labelled(items)
    return items if limit is None else _drawn(items, limit, seed)


def _bundled(names: str, limit: int, seed: int) -> list[Item]:
    """Held-out questions, in the form the bundled model was trained on."""
    from vllm_adaskip.lab.testbed.tasks import TASKS, samples

    chosen = [name.strip() for name in names.split(",")] if names else list(TASKS)
    for name in chosen:
        if name not in TASKS:
            raise DataError(f"{BUNDLED}: no task {name!r}; allowed: {', '.join(TASKS)}")
    return [
        Item(f"{name}/{index}", name, sample.prompt, (sample.answer,), "exact_match")
        for name in chosen
        for index, sample in enumerate(samples(name, "test", 1000 + seed, limit))
    ]


def _from_file(path: Path, metric: str) -> Iterator[Item]:
    seen: set[str] = set()
    for number, (where, row) in enumerate(read_rows(path), 1):
        item = _item(row, where, path.stem, number, metric)
        if item.item in seen:
            raise DataError(f"{where}: id {item.item!r:.80} comes twice")
        seen.add(item.item)
        yield item


def _item(row: dict[str, Any], where: str, task: str, number: int, metric: str) -> Item:
    try:
        line = Line.model_validate(row)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        allowed = ", ".join(Line.model_fields)
        raise DataError(f"{where}: {key}: {first['msg']}; allowed keys: {allowed}") from None
    if line.reference is not None and line.references is not None:
        raise DataError(f"{where}: reference and references; allowed: either")
    references = line.references or ([] if line.reference is None else [line.reference])
    name = line.metric or metric
    if name not in METRICS:
        raise DataError(f"{where}: metric {name!r:.80}; allowed: {', '.join(METRICS)}")
    if not references or not all(one.strip() for one in references):
        raise DataError(f"{where}: metric {name!r} needs a reference that is not empty")
    if name == "number" and None in map(last_number, references):
        raise DataError(f"{where}: metric 'number' needs references with a number")
    task = line.task or task
    return Item(line.id or f"{task}/{number}", task, line.prompt, tuple(references), name)


def _labelled(items: list[Item]) -> list[Item]:
    """Tell items of metric ``accuracy`` all labels of their task."""
    labels: dict[str, dict[str, None]] = {}
    for item in items:
        if item.metric == "accuracy":
            labels.setdefault(item.task, {}).update(dict.fromkeys(item.references))
    return [
        replace(item, labels=tuple(labels[item.task])) if item.metric == "accuracy" else item
        for item in items
    ]


def _drawn(items: list[Item], limit: int, seed: int) -> list[Item]:
    rng = random.Random(seed)
    by_task: dict[str, list[Item]] = {}
    for item in items:
        by_task.setdefault(item.task, []).append(item)
    kept = {
        one.item
        for members in by_task.values()
        for one in rng.sample(members, min(limit, len(members)))
    }
    return [item for item in items if item.item in kept]
