# SPDX-License-Identifier: Apache-2.0
"""How little each sub-layer of a frozen model changes the residual stream, on examples.

The cosine similarity of the stream before and after, `classifiers.cosine`, the same function that
a server's methods use; of the whole model, nothing left out. And the picture of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from vllm_adaskip.classifiers.cosine import cosine
from vllm_adaskip.lab.fitting.samples import Batch, Sample, answer_logits, batches_of
from vllm_adaskip.lab.fitting.sub_layers import visited

FILE = "similarity.png"
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
        fed = one.fed
        weights[places] = fed.sum(1).numpy(force=True)
        tokens.append(values[fed].numpy(force=True))
        ages.append((fed.long().cumsum(1) - 1)[fed].numpy(force=True))
    return Similarities(prompts, np.concatenate(tokens), np.concatenate(ages), weights)


def _of_batch(model: Any, batch: Batch) -> Tensor:
    """Return ``[rows, tokens, 2 * num_layers]`` float64."""
    seen: list[Tensor] = []

    def look(sub_layer: int, before: Tensor, update: Tensor) -> Tensor:
        seen.append(cosine(before, update))
        return update

    with visited(model, look):
        answer_logits(model, batch)
    return torch.stack(seen, dim=-1).double()


def draw_similarities(
    found: Similarities, middle: range, threshold: float | None, folder: Path
) -> None:
    """Draw each sub-layer's mean; the ends that are kept are shaded, the threshold is dashed."""
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    layers = np.arange(found.prompts.shape[1] // 2)
    for values, what, colour in (
        (found.prompts, "prompts", "#1f6fb4"),
        (found.tokens, "answers", "#c8561b"),
    ):
        mlp, attention = values[:, 1::2], values[:, ::2]
        low, high = np.quantile(mlp, [0.1, 0.9], axis=0)
        axes.fill_between(layers, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(layers, mlp.mean(0), "o-", color=colour, label=f"MLP, {what}")
        axes.plot(
            layers, attention.mean(0), ":", color=colour, linewidth=1, label=f"attention, {what}"
        )
    for start, end in ((-0.5, middle.start - 0.5), (middle.stop - 0.5, len(layers) - 0.5)):
        axes.axvspan(start, end, color="0.5", alpha=0.12, linewidth=0)
    title = "bands: 10th to 90th percentile"
    if threshold is not None:
        axes.axhline(threshold, color="0.2", linestyle="--", linewidth=1)
        title = f"threshold {threshold:.4f} (dashed); {title}"
    axes.set(
        xlabel="decoder layer (shaded: always runs)",
        ylabel="cosine of the stream before and after",
        xlim=(-0.5, len(layers) - 0.5),
        ylim=(_bottom(found), 1.005),
        title=title,
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower center")
    figure.savefig(folder / FILE, dpi=110)


def _bottom(found: Similarities) -> float:
    """Return where the axis ends, so that an outlier at an end does not flatten the rest."""
    means = np.concatenate([found.prompts.mean(0), found.tokens.mean(0)])
    return float(np.quantile(means, 0.1)) - 0.05
