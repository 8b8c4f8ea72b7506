# SPDX-License-Identifier: Apache-2.0
"""How much damage a frozen model bears: layers deleted or swapped, arXiv 2406.19384.

The damaged model reads the prompt and the reference answer (teacher forcing) and is compared
with the whole model at the answer's tokens. As in the paper the damage is to every token, the
prompt's too. A skip plan spares the prompt, so it should cost less than the same deletion here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from vllm_adaskip.lab.evaluation.results import Results, SweepCell
from vllm_adaskip.lab.fitting.samples import IGNORED, Sample

MAX_BLOCK = 4
#: Bytes of the stream below a damage that are kept, at most; above it all layers run anew.
MOST_KEPT = 2 << 30


class SweepError(ValueError):
    """A sweep that cannot be run; the message names the value and what is allowed."""


@dataclass(frozen=True)
class Damage:
    """What is done to the decoder: ``delete`` these layers (none: whole), or ``swap`` two."""

    kind: Literal["delete", "swap"]
    layers: tuple[int, ...]

    def order(self, num_layers: int) -> list[int]:
        """Return the layers that run, in order."""
        if self.kind == "delete":
            return [layer for layer in range(num_layers) if layer not in self.layers]
        first, second = self.layers
        other = {first: second, second: first}
        return [other.get(layer, layer) for layer in range(num_layers)]

    @property
    def first(self) -> int:
        """The first layer that is not as it was; 0 of the whole model, which runs all."""
        return min(self.layers, default=0)


WHOLE = Damage("delete", ())


def damages(num_layers: int, max_block: int = MAX_BLOCK) -> list[Damage]:
    """Return the sweep: nothing, each block of 1 to ``max_block`` layers, each swap of neighbours.

    Ordered by the first layer, as `Judge` goes on from what is below it.
    """
    if not 1 <= max_block < num_layers:
        raise SweepError(f"blocks of {max_block} layers; allowed: 1 to {num_layers - 1}")
    blocks = [
        Damage("delete", tuple(range(first, first + size)))
        for size in range(1, max_block + 1)
        for first in range(num_layers - size + 1)
    ]
    swaps = [Damage("swap", (first, first + 1)) for first in range(num_layers - 1)]
    return [WHOLE, *sorted([*blocks, *swaps], key=lambda damage: damage.first)]


class Below(nn.Module):
    """Stands for the layers below a damage: returns what they made of the batch that is read.

    Attributes:
        layers: it stands for the first so many.
        made: what the last of these layers returned, by task and first sample of the batch.

    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = 0
        self.made: dict[tuple[str, int], Any] = {}
        self.batch: tuple[str, int] = "", 0

    def forward(self, *_: Any, **__: Any) -> Any:
        """Return it."""
        return self.made[self.batch]

    def keep(self, _: nn.Module, __: Any, made: Any) -> None:
        """Write down what the last layer below the damage makes of the batch (a forward hook)."""
        self.made[self.batch] = made


@contextmanager
def damaged(model: Any, damage: Damage, below: Below | None = None) -> Iterator[None]:
    """Damage a transformers model for a while; ``below`` runs in the stead of its first layers."""
    below = below or Below()
    with running(model, below, damage.order(len(model.model.layers))[below.layers :]):
        yield


@contextmanager
def running(model: Any, below: Below, order: Sequence[int]) -> Iterator[None]:
    """Have a transformers model run what stands for its first layers, then these, for a while."""
    decoder, config = model.model, model.model.config
    layers, types = decoder.layers, getattr(config, "layer_types", None)
    first = [below] if below.layers else []
    try:
        decoder.layers = nn.ModuleList([*first, *(layers[layer] for layer in order)])
        config.num_hidden_layers = len(decoder.layers)
        if types is not None:  # models of mixed attention look a place's mask up by it
            config.layer_types = [*types[: len(first)], *(types[layer] for layer in order)]
        yield
    finally:
        decoder.layers, config.num_hidden_layers = layers, len(layers)
        if types is not None:
            config.layer_types = types


class Judge:
    """A model and the samples on which it, damaged, is compared with itself.

    Args:
        model: of transformers, with ``model.model.layers``.
        samples: of one task or several.
        batch: how many are read at once.

    """

    def __init__(self, model: Any, samples: Sequence[Sample], batch: int = 16) -> None:
        if not hasattr(getattr(model, "model", None), "layers"):
            raise SweepError(f"{type(model).__name__}: allowed: a model with model.model.layers")
        longest = max((len(each.ids) for each in samples), default=0)
        allowed = getattr(model.config, "max_position_embeddings", longest)
        if not 0 < longest <= allowed:
            raise SweepError(f"longest sample: {longest} tokens; allowed: 1 to {allowed}")
        self.model, self.batch = model, batch
        self.num_layers = len(model.model.layers)
        self.samples: dict[str, list[Sample]] = {}
        for each in samples:
            self.samples.setdefault(each.task, []).append(each)
        for members in self.samples.values():
            members.sort(key=_sizes)  # so that a batch needs little padding
        self._below = Below()
        width = model.config.hidden_size * torch.finfo(model.dtype).bits // 8
        tokens = sum(len(each.ids) for each in samples)
        self._keeps = tokens * width <= MOST_KEPT
        self._whole = {task: self._read(task) for task in self.samples}

    def cell(self, damage: Damage, task: str) -> SweepCell:
        """Compare the damaged model with the whole one.

        Damages in ascending order of their first layer are read from there on only.
        """
        if damage == WHOLE:
            top, loss = self._whole[task]
        else:
            if self._keeps:
                self._go_on_to(damage.first)
            with damaged(self.model, damage, self._below):
                top, loss = self._read(task)
        return SweepCell(
            kind=damage.kind,
            layers=list(damage.layers),
            task=task,
            tokens=len(top),
            agreement=(top == self._whole[task][0]).double().mean().item(),
            loss=loss.double().mean().item(),
        )

    def tokens(self, task: str) -> int:
        """Count the answers' tokens."""
        return len(self._whole[task][0])

    def _go_on_to(self, layer: int) -> None:
        """Run the whole model's layers below one, from where the last damage began."""
        below = self._below
        if layer < below.layers:
            self._below = below = Below()
        if layer == below.layers:
            return
        hook = self.model.model.layers[layer - 1].register_forward_hook(below.keep)
        try:
            with running(self.model, below, range(below.layers, layer)):
                for task in self.samples:
                    self._read(task, logits=False)
        finally:
            hook.remove()
        below.layers = layer

    @torch.inference_mode()
    def _read(self, task: str, *, logits: bool = True) -> tuple[Tensor, Tensor]:
        """Return the likeliest token and the reference's cross-entropy, both ``[tokens]``."""
        samples, parts = self.samples[task], []
        for start in range(0, len(samples), self.batch):
            self._below.batch = task, start
            parts.append(self._read_batch(samples[start : start + self.batch], logits))
        tops, losses = zip(*parts, strict=True)
        return torch.cat(tops), torch.cat(losses)

    def _read_batch(self, samples: list[Sample], logits: bool) -> tuple[Tensor, Tensor]:
        # Padded on the left, so that only the last columns' logits need be computed.
        length, width = (max(sizes) for sizes in zip(*map(_sizes, samples), strict=True))
        ids = torch.zeros(len(samples), length, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for row, each in enumerate(samples):
            ids[row, -len(each.ids) :] = torch.tensor(each.ids)
            mask[row, -len(each.ids) :] = 1
            labels[row, -each.answer :] = ids[row, -each.answer :]
        device = self.model.device
        output = self.model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(device),
            use_cache=False,
            logits_to_keep=width + 1 if logits else 1,
        )
        if not logits:
            return (nothing := torch.zeros(0)), nothing
        wanted = (labels := labels[:, -width:].to(device)) != IGNORED
        found, answers = output.logits[:, :-1][wanted].float(), labels[wanted]
        return found.argmax(-1), functional.cross_entropy(found, answers, reduction="none")


def _sizes(sample: Sample) -> tuple[int, int]:
    return len(sample.ids), sample.answer


class Sweep:
    """The cells of a results folder; those that are missing are measured.

    Raises:
        SweepError: the folder has cells of other items.

    """

    def __init__(self, results: Results, judge: Judge) -> None:
        self.results, self.judge = results, judge
        self._cells: dict[tuple[Damage, str], SweepCell] = {}
        for cell in results.read(SweepCell):
            if cell.task in judge.samples and cell.tokens != (now := judge.tokens(cell.task)):
                raise SweepError(
                    f"{results.folder} has cells of {cell.tokens} {cell.task!r} tokens, but these "
                    f"items have {now}; use the same data, limit and seed, or another folder"
                )
            self._cells[Damage(cell.kind, tuple(cell.layers)), cell.task] = cell

    def measured(self, damage: Damage) -> bool:
        """Whether all tasks' cells are there."""
        return all((damage, task) in self._cells for task in self.judge.samples)

    def cells(self, damage: Damage) -> list[SweepCell]:
        """Return a damage's cells, one a task; what had to be measured is stored."""
        missing = [task for task in self.judge.samples if (damage, task) not in self._cells]
        new = [self.judge.cell(damage, task) for task in missing]
        self.results.append(new)
        self._cells.update({(damage, cell.task): cell for cell in new})
        return [self._cells[damage, task] for task in self.judge.samples]


def overall(cells: Sequence[SweepCell]) -> tuple[float, float]:
    """Return agreement and loss over the tokens of all tasks together."""
    tokens = sum(cell.tokens for cell in cells)
    agreement = sum(cell.tokens * cell.agreement for cell in cells) / tokens
    return agreement, sum(cell.tokens * cell.loss for cell in cells) / tokens
