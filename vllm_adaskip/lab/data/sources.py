# SPDX-License-Identifier: Apache-2.0
"""Where questions come from: bundled tasks, lm-evaluation-harness tasks, files of rows."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from vllm_adaskip.lab.data.chat import ChatTemplate
from vllm_adaskip.lab.data.items import BUNDLED, HARNESS, DataError, Item
from vllm_adaskip.lab.data.row_item import item_of
from vllm_adaskip.lab.data.rows import read_rows, renamed


def load_items(
    source: str,
    *,
    limit: int | None = None,
    seed: int = 0,
    metric: str = "exact_match",
    lm_eval_path: Path | None = None,
    model: str | None = None,
    columns: tuple[str, str] | None = None,
    apply_chat_template: bool = False,
) -> list[Item]:
    """Read a data set.

    Args:
        source: ``bundled``, ``bundled:sum,hop``, ``lm-eval:gsm8k`` or the path of a file: JSON
            lines, a JSON array, CSV or Parquet.
        limit: at most so many items of each task, drawn by ``seed``, of harness tasks the first;
            bundled: 100.
        seed: of the bundled questions, or of the draw.
        metric: of rows that name none.
        lm_eval_path: folder of more harness tasks.
        model: whose chat template makes prompts of messages.
        columns: of a file, of prompts (or messages) and references; all others are passed over.
        apply_chat_template: makes a user's message of each prompt.

    Raises:
        DataError: a file, a line, a task or a metric that cannot be used.

    """
    template = None if model is None else ChatTemplate(model)
    if apply_chat_template and template is None:
        raise DataError("a chat template is a model's, and none is named")
    if source.startswith(f"{HARNESS}:"):
        from vllm_adaskip.lab.data.harness import load_tasks

        if columns:
            raise DataError(f"--columns is of files, not of {source!r:.80}")
        chat = template if apply_chat_template else None
        return load_tasks(source.partition(":")[2], lm_eval_path, limit, chat)
    if lm_eval_path is not None:
        raise DataError(f"--lm-eval-path goes with --data {HARNESS}:TASK, not with {source!r:.80}")
    if source == BUNDLED or source.startswith(f"{BUNDLED}:"):
        if apply_chat_template or columns:
            raise DataError(f"--columns and --apply-chat-template are of files, not of {source!r}")
        return _bundled(source.partition(":")[2], 100 if limit is None else limit, seed)
    items = list(_from_file(Path(source), metric, columns, template, apply_chat_template))
    if not items:
        raise DataError(f"{source}: no items; allowed: rows with a prompt and a reference")
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


def _from_file(
    path: Path,
    metric: str,
    columns: tuple[str, str] | None,
    template: ChatTemplate | None,
    chat: bool,
) -> Iterator[Item]:
    rows = read_rows(path)
    seen: set[str] = set()
    for number, (where, row) in enumerate(renamed(rows, columns) if columns else rows, 1):
        try:
            item = item_of(row, number, path.stem, metric, template, chat)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        if item.item in seen:
            raise DataError(f"{where}: id {item.item!r:.80} comes twice")
        seen.add(item.item)
        yield item


def _labelled(items: list[Item]) -> list[Item]:
    """Return items that know, for metric ``accuracy``, their choices or all labels of the task."""
    labels: dict[str, dict[str, None]] = {}
    for item in items:
        if item.metric == "accuracy":
            labels.setdefault(item.task, {}).update(dict.fromkeys(item.references))
    return [
        replace(item, labels=item.choices or tuple(labels[item.task]))
        if item.metric == "accuracy"
        else item
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
