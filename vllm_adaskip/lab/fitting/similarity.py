# SPDX-License-Identifier: Apache-2.0
"""How little each sub-layer of a frozen model changes the residual stream, on examples.

The cosine similarity of the stream before and after, `classifiers.cosine`, the same function that
a server's methods use; of the whole model, nothing left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_adaskip.classifiers.cosine import cosine
from vllm_adaskip.lab.fitting.answers import answer_logits
from vllm_adaskip.lab.fitting.samples import Batch, Sample, batches_of
from vllm_adaskip.lab.fitting.sub_layers import visited

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Similarities:
    """Of all sub-layers, in running order attention 0, MLP 0, attention 1, ...

    Attributes:
        prompts: ``[samples, 2 * num_layers]`` mean over each prompt's tokens.
        tokens: ``[tokens, 2 * num_layers]`` of each token of the answers that is fed: all but
            the last of each.
        ages: ``[tokens]`` how many tokens of its answer came before each.
        weights: ``[samples]`` tokens of each answer that are fed.

    """

    prompts: Floats
    tokens: Floats
    ages: NDArray[np.int64]
    weights: NDArray[np.int64]


@torch.no_grad()
def similarities(
    model: Any, samples: Sequence[Sample], batch: int, done: Callable[[int], None]
) -> Similarities:
    """Measure a model of transformers; ``done`` is told how many more samples are."""
    found = []
    for places, one in batches_of(samples, batch, model.device):
        found.append((places, one, _of_batch(model, one)))
        done(len(places))
    width = found[0][2].shape[-1]
    prompts, weights = np.empty((len(samples), width)), np.empty(len(samples), dtype=np.int64)
    tokens, ages = [], []
    for places, one, values in found:
        real = one.prompt[..., None]
        prompts[places] = (values.masked_fill(~real, 0).sum(1) / real.sum(1)).numpy(force=True)
        fed = one.answer.clone()
        fed[:, -1] = False
        weights[places] = fed.sum(1).numpy(force=True)
        tokens.append(values[fed].numpy(force=True))
        ages.append((fed.long().cumsum(1) - 1)[fed].numpy(force=True))
    return Similarities(prompts, np.concatenate(tokens), np.concatenate(ages), weights)


def _of_batch(model: Any, batch: Batch) -> Tensor:
    """Give ``[rows, tokens, 2 * num_layers]`` float64."""
    seen: list[Tensor] = []

    def look(sub_layer: int, before: Tensor, update: Tensor) -> Tensor:
        seen.append(cosine(before, update))
        return update

    with visited(model, look):
        answer_logits(model, batch)
    return torch.stack(seen, dim=-1).double()
