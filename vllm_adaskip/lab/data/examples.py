# SPDX-License-Identifier: Apache-2.0
"""Training examples: prompts with their right answers, as `Item`s whose reference is the answer."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from vllm_adaskip.lab.data.items import BUNDLED, DataError, Item
from vllm_adaskip.lab.data.sources import load_items

HUB = "hub:"
HUB_COLUMNS = ("prompt", "answer")
#: Fewer examples than this teach nothing, whatever the batch.
LEAST = 16


def load_examples(
    source: str,
    *,
    limit: int = 500,
    seed: int = 0,
    batch: int = 16,
    columns: tuple[str, str] = HUB_COLUMNS,
    model: str | None = None,
    apply_chat_template: bool = False,
) -> list[Item]:
    """Read training examples, in random order.

    Args:
        source: ``bundled`` or ``bundled:sum,hop`` (the training split), a file of JSON lines as
            `load_items` reads it, or ``hub:NAME``, ``hub:NAME:SPLIT``, ``hub:NAME:SPLIT:CONFIG``.
        limit: at most so many examples of each task.
        seed: of the bundled questions, of the draw, and of the order.
        batch: of the training to come, which needs two of them.
        columns: of a data set of the hub, prompt and answer; of a file if they are others.
        model: whose chat template makes prompts of messages.
        apply_chat_template: of a file, makes a user's message of each prompt.

    Raises:
        DataError: a source, a line or a row that cannot be used, or too few of them.

    """
    is_file = not source.startswith((HUB, BUNDLED))
    if apply_chat_template and not is_file:
        raise DataError(f"--apply-chat-template is of files, not of {source!r:.80}")
    if source.startswith(HUB):
        items = list(_from_hub(source, limit, seed, columns))
    elif source == BUNDLED or source.startswith(f"{BUNDLED}:"):
        items = list(_bundled(source, limit, seed))
    else:
        named = None if columns == HUB_COLUMNS else columns
        items = load_items(
            source, limit=limit, seed=seed, columns=named, model=model,
            apply_chat_template=apply_chat_template,
        )  # fmt: skip
    if len(items) < (least := max(LEAST, 2 * batch)):
        raise DataError(
            f"{source}: {len(items)} examples; allowed: {least} or more, two batches of {batch}"
        )
    random.Random(seed).shuffle(items)
    return items


def _bundled(source: str, limit: int, seed: int) -> Iterator[Item]:
    """Draw from the split the bundled model was trained on; `load_items` has the held-out one."""
    from vllm_adaskip.lab.testbed.tasks import samples

    for task in dict.fromkeys(item.task for item in load_items(source, limit=1)):
        for index, one in enumerate(samples(task, "train", seed, limit)):
            yield Item(f"{task}/{index}", task, one.prompt, (one.answer,), "exact_match")


def _from_hub(source: str, limit: int, seed: int, columns: tuple[str, str]) -> Iterator[Item]:
    """Read rows of a data set; its builder runs no code from the hub."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    name, split, config = (*source.removeprefix(HUB).split(":", 2), "", "")[:3]
    try:
        rows = load_dataset(name, config or None, split=split or "train")
    except (DatasetsError, OSError, ValueError) as error:
        raise DataError(f"{source}: {error}") from None
    if missing := [column for column in columns if column not in rows.column_names]:
        raise DataError(
            f"{source}: no column {missing[0]!r}; it has {', '.join(rows.column_names)}"
        )
    for number in _drawn(len(rows), limit, seed):
        prompt, answer = _texts(rows[number], columns, f"{source}: row {number}")
        yield Item(f"{name}/{number}", name, prompt, (answer,), "exact_match")


def _drawn(size: int, limit: int, seed: int) -> Sequence[int]:
    return sorted(random.Random(seed).sample(range(size), min(limit, size)))


def _texts(row: dict[str, Any], columns: tuple[str, str], where: str) -> list[str]:
    for column in columns:
        if not isinstance(row[column], str) or not row[column].strip():
            raise DataError(f"{where}: {column} is {row[column]!r:.80}; allowed: a text")
    return [row[column] for column in columns]
