# SPDX-License-Identifier: Apache-2.0
"""A batch of prompts with their right answers, as a model is fed with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_adaskip.evaluation.sweep import IGNORED, Sample


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
    def labels(self) -> Tensor:
        """The token to come, for each token but the last; `IGNORED` where it is no answer's."""
        return self.ids.masked_fill(~self.answer, IGNORED)[:, 1:]

    @property
    def positions(self) -> Tensor:
        """Each token's place in its own row, padding aside."""
        return (self.real.long().cumsum(1) - 1).clamp(min=0)


def batch_of(samples: Sequence[Sample], device: torch.device) -> Batch:
    """Pad on the left, so that all answers end in the last column."""
    width = max(len(each.ids) for each in samples)
    ids = torch.zeros(len(samples), width, dtype=torch.long)
    lengths = torch.tensor([len(each.ids) for each in samples])[:, None]
    answers = torch.tensor([each.answer for each in samples])[:, None]
    for row, each in enumerate(samples):
        ids[row, -len(each.ids) :] = torch.tensor(each.ids)
    left = width - torch.arange(width)  # columns from here to the end
    real = left <= lengths
    return Batch(ids.to(device), real.to(device), (real & (left > answers)).to(device))


def batches_of(
    samples: Sequence[Sample], size: int, device: torch.device
) -> Iterator[tuple[list[int], Batch]]:
    """Give all samples in batches of little padding, with their places in ``samples``."""
    order = sorted(range(len(samples)), key=lambda place: len(samples[place].ids))
    for start in range(0, len(order), size):
        places = order[start : start + size]
        yield places, batch_of([samples[place] for place in places], device)
