# SPDX-License-Identifier: Apache-2.0
"""Prompts with their right answers, in the batches a model is fed with, and what it says then."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vllm_adaskip.lab.data.items import DataError, Item
from vllm_adaskip.lab.data.tokens import (
    answer_tokens,
    end_after,
    first_tokens,
    prompt_tokens,
)

IGNORED = -100


@dataclass(frozen=True)
class Sample:
    """A prompt with its reference answer: all tokens, and how many at the end are the answer.

    ``begins`` are more tokens by which the answer may begin, in all forms in which models write
    it; empty: it begins as it stands there.
    """

    task: str
    ids: list[int]
    answer: int
    begins: frozenset[int] = frozenset()


def sample(item: Item, tokenizer: Any, ends: Sequence[int] = ()) -> Sample:
    """Tokenise an item with its first reference.

    Args:
        item: a prompt with its answer.
        tokenizer: of transformers.
        ends: tokens that end an answer, `end_tokens`; the one that fits the prompt is added.

    Raises:
        DataError: the tokenizer leaves no token of the prompt, or none of the answer.

    """
    prompt = prompt_tokens(item.prompt, tokenizer)
    answer = answer_tokens(item.prompt, item.references[0], tokenizer)
    answer += end_after(prompt, ends, tokenizer)
    if not prompt or not answer:
        raise DataError(f"item {item.item!r}: {len(prompt)} tokens of a prompt, {len(answer)} more")
    begins = frozenset(first_tokens(item.references[0], tokenizer))
    return Sample(item.task, [*prompt, *answer], len(answer), begins)


@dataclass(frozen=True)
class Batch:
    """Token rows, padded on either side.

    Attributes:
        ids: ``[rows, tokens]``.
        real: which of them are no padding.
        prompt: which of them are the prompt's; the other real ones are the answer's.

    """

    ids: Tensor
    real: Tensor
    prompt: Tensor

    @property
    def answer(self) -> Tensor:
        """Which tokens are the answer's: those that a plan applies to, once they are fed."""
        return self.real & ~self.prompt

    @property
    def fed(self) -> Tensor:
        """Which tokens of answers another one follows: those that a server is fed with."""
        answer = self.answer
        return answer & functional.pad(answer[:, 1:], (0, 1))

    @property
    def labels(self) -> Tensor:
        """The token to come, for each token but the last; `IGNORED` where it is no answer's."""
        return self.ids.masked_fill(~self.answer, IGNORED)[:, 1:]

    @property
    def positions(self) -> Tensor:
        """Each token's place in its own row, padding aside."""
        return (self.real.long().cumsum(1) - 1).clamp(min=0)


def batch_of(samples: Sequence[Sample], device: torch.device) -> Batch:
    """Pad prompts on the left and answers on the right, so that all answers begin in one column."""
    prompts = torch.tensor([len(each.ids) - each.answer for each in samples])[:, None]
    answers = torch.tensor([each.answer for each in samples])[:, None]
    begin = int(prompts.max())
    behind = torch.arange(begin + int(answers.max())) - begin  # the column of answers' first tokens
    real = (behind >= -prompts) & (behind < answers)
    ids = torch.zeros(real.shape, dtype=torch.long)
    ids[real] = torch.tensor([token for each in samples for token in each.ids])
    return Batch(ids.to(device), real.to(device), (real & (behind < 0)).to(device))


def batches_of(
    samples: Sequence[Sample], size: int, device: torch.device
) -> Iterator[tuple[list[int], Batch]]:
    """Return all samples in batches of little padding, with their places in ``samples``."""
    order = sorted(range(len(samples)), key=lambda place: len(samples[place].ids))
    for start in range(0, len(order), size):
        places = order[start : start + size]
        yield places, batch_of([samples[place] for place in places], device)


def held_back(samples: Sequence[Sample]) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """Split answers into those that judge, at most 64, and those that train."""
    held = max(1, min(64, len(samples) // 10))
    return samples[:held], samples[held:]


def before_answers(batch: Batch) -> int:
    """Count the columns before the one that answers' first tokens follow."""
    return answers_begin(batch) - 1


def answers_begin(batch: Batch) -> int:
    """Return the column of answers' first tokens."""
    return int(batch.answer.any(0).int().argmax())


def answer_logits(model: Any, batch: Batch, cache: Any = None) -> Tensor:
    """Return logits ``[rows, tokens - 1 or fewer, vocabulary]`` for the last of `Batch.labels`.

    ``cache`` has the keys and values of the columns `before_answers`, which are not run again.
    """
    wanted = inspect.signature(model.forward).parameters
    before, width = before_answers(batch), batch.ids.shape[1]
    start = 0 if cache is None else before
    inputs = {
        "input_ids": batch.ids[:, start:],
        "attention_mask": batch.real.long(),
        "position_ids": batch.positions[:, start:],
        "past_key_values": cache,
        "use_cache": cache is not None,
        # The logits of a prompt would take more memory than all else.
        "logits_to_keep": width - before,
    }
    output = model(**{name: each for name, each in inputs.items() if name in wanted})
    logits: Tensor = output.logits[:, before - width : -1]
    return logits


def answer_loss(batch: Batch, logits: Tensor) -> Tensor:
    """Return the mean cross-entropy of the answers' tokens, from `answer_logits`."""
    labels = batch.labels[:, -logits.shape[1] :]
    return functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED
    )
