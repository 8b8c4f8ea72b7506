# SPDX-License-Identifier: Apache-2.0
"""Training of a few parameters, which goes on from checkpoints as if never stopped; its picture.

Of LoRA weights too (arXiv 2106.09685), which stand beside a model's own.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import MethodType
from typing import Any, TypeVar

import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from vllm_adaskip.classifiers.profile import ADAPTER
from vllm_adaskip.lab.fitting.samples import Batch, Sample, batch_of
from vllm_adaskip.lab.fitting.sub_layers import decoder_layers

FILE = "curve.png"
#: Share of what a step adds to the running mean, which is drawn over the steps.
_SHARE = 0.1
#: Steps between checkpoints, and seconds, whichever come first.
EVERY, SECONDS = 25, 30.0
#: Pairs of tokens, padding among them, that attend to each other in what is run at once; a step
#: of more runs in parts. Eight rows of 512 tokens; of eight passages of 1,000 tokens training kept
#: 24 GiB.
_PAIRS = 2**21
One = TypeVar("One", bound=Sample)
#: Gives the terms of the loss by name.
Loss = Callable[[Batch], Mapping[str, Tensor]]
#: Each term of the loss, step by step.
Curve = dict[str, list[float]]


class Training:
    """Adam, at a rate that falls to nothing over the second half of the steps.

    The batches are the same each time, so a checkpoint need hold no more than parameters, moments
    and the losses so far.

    Args:
        parameters: what is trained, by name.
        batches: of samples, without end; `in_any_order` or `of_near_length`.
        steps: updates in all.
        rate: highest learning rate.
        checkpoint: file of safetensors; if it is there, training goes on from it.

    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        batches: Iterator[Sequence[Sample]],
        *,
        steps: int,
        rate: float,
        checkpoint: Path,
    ) -> None:
        self._parameters = dict(parameters)
        self._batches, self._steps = batches, steps
        self._rate, self._checkpoint = rate, checkpoint
        self._optimizer = torch.optim.Adam(self._parameters.values(), lr=rate)
        self._made = 0
        self._curve: Curve = {}
        if checkpoint.exists():
            self._load()

    def run(self, loss: Loss, device: torch.device, made: Callable[[int], None]) -> Curve:
        """Make the steps that are left; ``made`` is told how many were, as they are."""
        made(self._made)
        saved = time.monotonic()
        batches = islice(self._batches, self._made, self._steps)
        for step, samples in enumerate(batches, self._made):
            for group in self._optimizer.param_groups:
                group["lr"] = self._rate * min(1.0, 2 * (1 - step / self._steps))
            self._optimizer.zero_grad()
            terms: dict[str, float] = {}
            for part in in_parts(samples):
                share = len(part) / len(samples)
                found = loss(batch_of(part, device))
                torch.autograd.backward(share * torch.stack([*found.values()]).sum())
                for name, term in found.items():
                    terms[name] = terms.get(name, 0.0) + share * term.item()
            self._optimizer.step()
            for name, value in terms.items():
                self._curve.setdefault(name, []).append(value)
            self._made += 1
            is_due = self._made % EVERY == 0 or time.monotonic() - saved > SECONDS
            if is_due or self._made == self._steps:
                self._save()
                saved = time.monotonic()
            made(1)
        return self._curve

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


def in_any_order(samples: Sequence[Sample], size: int, seed: int) -> Iterator[Sequence[Sample]]:
    """Return batches, for ever: all samples, then all over again in another order."""
    rng = random.Random(seed)

    def stream() -> Iterator[Sample]:
        while True:
            yield from rng.sample(samples, len(samples))

    one = stream()
    while True:
        yield [*islice(one, size)]


def of_near_length(samples: Sequence[One], size: int, seed: int) -> Iterator[Sequence[One]]:
    """Return batches of about the same lengths, for ever, which need little padding.

    Answers come first, as they are what is trained with; prompts second.
    """
    rng = random.Random(seed)
    while True:
        drawn = rng.sample(samples, len(samples))
        for start in range(0, len(drawn), 32 * size):
            near = sorted(drawn[start : start + 32 * size], key=lambda one: one.answer)
            groups = [near[at : at + 4 * size] for at in range(0, len(near), 4 * size)]
            for group in groups:
                group.sort(key=lambda one: len(one.ids) - one.answer)
            own = [group[at : at + size] for group in groups for at in range(0, len(group), size)]
            rng.shuffle(own)
            yield from own


def in_parts(samples: Sequence[Sample]) -> Sequence[Sequence[Sample]]:
    """Return a batch in parts that fit into memory, the longest samples last; mostly it is one."""
    if _pairs(samples) <= _PAIRS:
        return [samples]
    parts: list[list[Sample]] = [[]]
    for one in sorted(samples, key=lambda one: len(one.ids)):
        if parts[-1] and _pairs([*parts[-1], one]) > _PAIRS:
            parts.append([])
        parts[-1].append(one)
    return parts


def _pairs(samples: Sequence[Sample]) -> int:
    """Return how many pairs of tokens samples make, as `batch_of` pads them."""
    answer = max(one.answer for one in samples)
    return len(samples) * (max(len(one.ids) - one.answer for one in samples) + answer) ** 2


def adapt(model: Any, rank: int, seed: int) -> Any:
    """Put LoRA beside every linear layer of the decoder layers, in place; return peft's model.

    The form is the plain one that a server can merge. At first it changes nothing.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import Linear

    torch.manual_seed(seed)
    parts = decoder_layers(model).named_modules()
    names = {name.rpartition(".")[2] for name, part in parts if isinstance(part, nn.Linear)}
    form = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=sorted(names))
    adapted = get_peft_model(model, form)
    for layer in adapted.modules():
        if isinstance(layer, Linear):
            layer.forward = MethodType(_merged, layer)
    return adapted


def _merged(layer: Any, values: Tensor) -> Tensor:
    """Run a layer with its adapter in its weight, as a server does.

    Of as many tokens as a training has that takes half the time of two more products.
    """
    base = layer.get_base_layer()
    if layer.disable_adapters:
        found: Tensor = base(values)
        return found
    (name,) = layer.active_adapters
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    kind = base.weight.dtype
    delta = up.to(kind) @ (layer.scaling[name] * down).to(kind)
    return functional.linear(values, base.weight + delta, base.bias)


def save_adapter(adapted: Any, profile: Path) -> None:
    """Write what `adapt` added into a profile's folder, without asking the hub for its model."""
    adapted.save_pretrained(profile / ADAPTER, save_embedding_layers=False)


def draw_curves(curves: Mapping[str, Curve], folder: Path, scale: str = "part of the loss") -> None:
    """Draw the phases side by side; ``scale`` says what is drawn."""
    figure = Figure(figsize=(5.6 * len(curves), 3.6), layout="constrained")
    for axes, (phase, terms) in zip(figure.subplots(1, len(curves), squeeze=False)[0],
                                    curves.items(), strict=True):  # fmt: skip
        for name, values in terms.items():
            (line,) = axes.plot(_smooth(values), label=name)
            axes.plot(values, color=line.get_color(), alpha=0.25, linewidth=0.7)
        axes.set(title=phase, xlabel="step", ylabel=scale, ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(folder / FILE, dpi=110)


def _smooth(values: list[float]) -> list[float]:
    mean, smooth = values[0], []
    for value in values:
        mean += _SHARE * (value - mean)
        smooth.append(mean)
    return smooth
