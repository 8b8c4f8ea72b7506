# SPDX-License-Identifier: Apache-2.0
"""Training batches: many samples per row, made in a background process."""

import multiprocessing
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerFast

from vllm_adaskip.lab.testbed import tasks
from vllm_adaskip.lab.testbed.tasks import Sample

IGNORED = -100
NAMES = [*tasks.TASKS, *tasks.EXERCISES]


@dataclass
class Batch:
    """Rows of tokens. A label is the next token where that belongs to an answer."""

    ids: Tensor
    labels: Tensor
    positions: Tensor
    segments: Tensor  # the sample's number within its row; -1 is padding


class Course:
    """How often each task is drawn and how long its questions are; shared with the worker."""

    def __init__(self) -> None:
        self._shares = multiprocessing.Array("d", [1.0] * len(NAMES))
        self._level = multiprocessing.Value("d", 0.0)

    @property
    def shares(self) -> dict[str, float]:
        """How often each task is drawn, relative to the others."""
        return {name: float(self._shares[index]) for index, name in enumerate(NAMES)}

    @property
    def level(self) -> float:
        """How long questions may be: 0 is short, 1 is full length."""
        return float(self._level.value)

    def set(self, shares: dict[str, float], level: float) -> None:
        """Change both for the batches still to be made."""
        self._level.value = level
        for index, name in enumerate(NAMES):
            self._shares[index] = shares[name]


class Packer:
    """Fills rows with samples; one that no longer fits waits for a later row."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, length: int) -> None:
        self.table = tokenizer.get_vocab()
        self.end = self.table[str(tokenizer.eos_token)]
        self.length = length
        self.waiting: list[tuple[list[int], int]] = []

    def _next(self, stream: Iterator[Sample], room: int) -> tuple[list[int], int] | None:
        for index, (tokens, _) in enumerate(self.waiting):
            if len(tokens) <= room:
                return self.waiting.pop(index)
        # A few tries at a short enough sample; the misses wait.
        while len(self.waiting) < 16:
            sample = next(stream, None)
            if sample is None:
                return None
            coded = self._encode(sample)
            if len(coded[0]) <= room:
                return coded
            self.waiting.append(coded)
        return None

    def _encode(self, sample: Sample) -> tuple[list[int], int]:
        """Return the sample's tokens with the end token, and how many are the prompt."""
        prompt = [self.table[word] for word in sample.prompt.split()]
        answer = [self.table[word] for word in sample.answer.split()]
        return [*prompt, *answer, self.end], len(prompt)

    def batch(self, stream: Iterator[Sample], rows: int) -> Batch:
        """Fill so many rows; at the stream's end some stay empty."""
        shape = (rows, self.length)
        batch = Batch(
            ids=torch.zeros(shape, dtype=torch.long),
            labels=torch.full(shape, IGNORED),
            positions=torch.zeros(shape, dtype=torch.long),
            segments=torch.full(shape, -1),
        )
        for row in range(rows):
            start, segment = 0, 0
            while found := self._next(stream, self.length - start):
                tokens, prompt = found
                end = start + len(tokens)
                batch.ids[row, start:end] = torch.tensor(tokens)
                batch.labels[row, start + prompt - 1 : end - 1] = torch.tensor(tokens[prompt:])
                batch.positions[row, start:end] = torch.arange(len(tokens))
                batch.segments[row, start:end] = segment
                start, segment = end, segment + 1
        return batch


class TrainingStream(IterableDataset[Batch]):
    """Batches without end, following the course as it changes."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, course: Course, seed: str, rows: int, length: int
    ) -> None:
        self.packer = Packer(tokenizer, length)
        self.course = course
        self.seed = seed
        self.rows = rows

    def _samples(self, rng: random.Random) -> Iterator[Sample]:
        while True:
            shares = self.course.shares
            for task in rng.choices(list(shares), list(shares.values()), k=256):
                yield tasks.draw(task, "train", rng, self.course.level)

    def __iter__(self) -> Iterator[Batch]:
        torch.set_num_threads(1)
        stream = self._samples(random.Random(self.seed))
        while True:
            yield self.packer.batch(stream, self.rows)


def loader(dataset: TrainingStream, background: bool = True) -> DataLoader[Batch]:
    """Yield the batches one by one, made ahead of time by one worker process."""
    return DataLoader(dataset, batch_size=None, num_workers=int(background))
