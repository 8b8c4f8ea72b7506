# SPDX-License-Identifier: Apache-2.0
"""Training of a few parameters, which goes on from checkpoints as if never stopped; its picture."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vllm_adaskip.lab.fitting.samples import Batch, Sample, batch_of

FILE = "curve.png"
#: Share of what a step adds to the running mean, which is drawn over the steps.
_SHARE = 0.1
#: Steps between checkpoints.
EVERY = 25
#: Gives the terms of the loss by name.
Loss = Callable[[Batch], Mapping[str, Tensor]]
#: Each term of the loss, step by step.
Curve = dict[str, list[float]]


class Training:
    """Adam, at a rate that falls to nothing over the second half of the steps.

    The order of the samples depends on the seed alone, so a checkpoint need hold no more than
    parameters, moments and the losses so far.

    Args:
        parameters: what is trained, by name.
        samples: drawn without repetition, then all over again in another order.
        steps: updates in all.
        batch: samples of an update.
        rate: highest learning rate.
        seed: of the order.
        checkpoint: file of safetensors; if it is there, training goes on from it.

    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        samples: Sequence[Sample],
        *,
        steps: int,
        batch: int,
        rate: float,
        seed: int,
        checkpoint: Path,
    ) -> None:
        self._parameters = dict(parameters)
        self._samples, self._steps, self._batch = samples, steps, batch
        self._rate, self._seed, self._checkpoint = rate, seed, checkpoint
        self._optimizer = torch.optim.Adam(self._parameters.values(), lr=rate)
        self._made = 0
        self._curve: Curve = {}
        if checkpoint.exists():
            self._load()

    def run(self, loss: Loss, device: torch.device, made: Callable[[int], None]) -> Curve:
        """Make the steps that are left; ``made`` is told how many were, as they are."""
        made(self._made)
        stream = islice(self._stream(), self._made * self._batch, None)
        for step in range(self._made, self._steps):
            batch = batch_of(list(islice(stream, self._batch)), device)
            for group in self._optimizer.param_groups:
                group["lr"] = self._rate * min(1.0, 2 * (1 - step / self._steps))
            terms = loss(batch)
            self._optimizer.zero_grad()
            torch.autograd.backward(torch.stack([*terms.values()]).sum())
            self._optimizer.step()
            for name, term in terms.items():
                self._curve.setdefault(name, []).append(term.item())
            self._made += 1
            if self._made % EVERY == 0 or self._made == self._steps:
                self._save()
            made(1)
        return self._curve

    def _stream(self) -> Iterator[Sample]:
        rng = random.Random(self._seed)
        while True:
            yield from rng.sample(self._samples, len(self._samples))

    def _save(self) -> None:
        tensors = {f"parameter.{name}": one.detach() for name, one in self._parameters.items()}
        for number, state in self._optimizer.state_dict()["state"].items():
            tensors |= {f"moment.{number}.{key}": value for key, value in state.items()}
        for name, values in self._curve.items():
            tensors[f"curve.{name}"] = torch.tensor(values, dtype=torch.float64)
        tensors = {name: one.cpu().contiguous() for name, one in tensors.items()}
        save_file(tensors, part := self._checkpoint.with_suffix(".part"))
        part.replace(self._checkpoint)

    def _load(self) -> None:
        tensors = load_file(self._checkpoint)
        state: dict[int, dict[str, Any]] = {}
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "parameter":
                self._parameters[rest].data.copy_(value)
            elif kind == "curve":
                self._curve[rest] = value.tolist()
                self._made = len(value)
            else:
                number, _, key = rest.partition(".")
                state.setdefault(int(number), {})[key] = value
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})


def draw_curves(curves: Mapping[str, Curve], folder: Path) -> None:
    """Draw the phases side by side."""
    figure = Figure(figsize=(5.6 * len(curves), 3.6), layout="constrained")
    for axes, (phase, terms) in zip(figure.subplots(1, len(curves), squeeze=False)[0],
                                    curves.items(), strict=True):  # fmt: skip
        for name, values in terms.items():
            (line,) = axes.plot(_smooth(values), label=name)
            axes.plot(values, color=line.get_color(), alpha=0.25, linewidth=0.7)
        axes.set(title=phase, xlabel="step", ylabel="part of the loss", ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(folder / FILE, dpi=110)


def _smooth(values: list[float]) -> list[float]:
    mean, smooth = values[0], []
    for value in values:
        mean += _SHARE * (value - mean)
        smooth.append(mean)
    return smooth
