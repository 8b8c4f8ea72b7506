# SPDX-License-Identifier: Apache-2.0
"""Layers that were taught to bear what is left out (`fit heal`), for tokens under plans alone.

Each linear layer of the decoder is there twice: as the checkpoint has it, and with the profile's
adapter in its weight. A token whose plan leaves something out runs the second, any other the
first, so dense requests are answered by the model as it is, and prompts have its K and V.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vllm_adaskip.classifiers.profile import ProfileError
from vllm_adaskip.engine.compat.modules import copied, linears, twin
from vllm_adaskip.engine.step import Bools, Part, Step, Tokens

if TYPE_CHECKING:
    from vllm_adaskip.engine.loop import SkippingDecoder


class Layers(NamedTuple):
    """What a step runs.

    Attributes:
        running: the decoder layers for tokens that run a sub-layer.
        passing: those for tokens that leave attention out and whose K/V are projected.
        rows: is told which rows are shown; None: nothing needs to be.

    """

    running: Sequence[Any]
    passing: Sequence[Any]
    rows: Rows | None


class Taught:
    """A model's taught layers, beside its own.

    Attributes:
        model: the model with taught layers for all tokens; all else is shared.
        linears: the taught linear layers, as a module that vLLM packs with the model's own.
        mebibytes: that they take.

    """

    def __init__(self, model: SkippingDecoder, weights: Mapping[str, Tensor]) -> None:
        """Take a model that is loaded, and not yet packed for kernels.

        Args:
            model: the whole one.
            weights: taught ones, by the names of the model's checkpoint.

        Raises:
            ProfileError: a weight of something else than a linear layer in a decoder layer.

        """
        whole = model.stack_of(model.model)
        pairs = {each: copied(each) for each in linears(whole.layers)}
        self.linears = nn.ModuleList(pairs.values())
        self.mebibytes = sum(each.nbytes for each in self.linears.parameters()) / (1 << 20)
        self._plain = model.layers
        self.model, loaded = model.with_model(twin(model.model, pairs.get), weights)
        own = {id(each) for each in self.linears.parameters()}
        others = {name for name, each in self.model.named_parameters() if id(each) not in own}
        if wrong := sorted(others & loaded):
            raise ProfileError(
                f"the profile's LoRA for tokens under plans changes {wrong[0]}; allowed: linear "
                "layers in decoder layers"
            )
        self._rows = Rows()
        split = {plain: Split(plain, own, self._rows) for plain, own in pairs.items()}
        self._mixed = [twin(layer, split.get) for layer in self._plain]

    def of(self, step: Step, device: torch.device) -> Layers:
        """Return the layers for a step, whose tokens are on a device."""
        own = self.model.layers
        if step.leaving.all():
            return Layers(own, own, None)
        if not step.leaving.any():
            return Layers(self._plain, own, None)
        self._rows.begin(step, device)
        return Layers(self._mixed, own, self._rows)


class Rows:
    """Which of the rows that are shown are under plans.

    Attributes:
        plain: int64 ``[rows]`` places of those that are not, among the ones shown; None: none is.
        taught: of the others.

    """

    def __init__(self) -> None:
        self.plain: Tensor | None = None
        self.taught: Tensor | None = None
        self._leaving: Bools | None = None
        self._seen: dict[Part | None, tuple[Tensor | None, Tensor | None]] = {}

    def begin(self, step: Step, device: torch.device) -> None:
        """Begin a step, of which all rows are shown."""
        if self._leaving is not step.leaving:
            self._leaving, self._seen = step.leaving, {}
        self.show(None, device)

    def show(self, tokens: Tokens | None, device: torch.device) -> None:
        """Take which tokens of the step are shown; None: all."""
        assert self._leaving is not None
        if tokens is not None and not isinstance(tokens, Part):
            return  # they pass by, in layers of their own
        if tokens not in self._seen:
            leaving = self._leaving if tokens is None else self._leaving[tokens.positions]
            self._seen[tokens] = _places(~leaving, device), _places(leaving, device)
        self.plain, self.taught = self._seen[tokens]


def _places(wanted: Bools, device: torch.device) -> Tensor | None:
    (found,) = np.nonzero(wanted)
    return torch.from_numpy(found).to(device) if len(found) else None


class Split(nn.Module):
    """A linear layer that runs some rows by one weight, and some by another."""

    def __init__(self, plain: nn.Module, taught: nn.Module, rows: Rows) -> None:
        super().__init__()
        self._plain, self._taught, self._rows = plain, taught, rows

    def forward(self, values: Tensor) -> Any:
        """Return what the layers do, for ``[rows, width]``."""
        plain, taught = self._rows.plain, self._rows.taught
        if taught is None:
            return self._plain(values)
        if plain is None:
            return self._taught(values)
        first = self._plain(values.index_select(0, plain))
        second = self._taught(values.index_select(0, taught))
        if not isinstance(first, tuple):
            return _joined(first, plain, second, taught)
        return _joined(first[0], plain, second[0], taught), *first[1:]


def _joined(first: Tensor, plain: Tensor, second: Tensor, taught: Tensor) -> Tensor:
    whole = first.new_empty(len(first) + len(second), *first.shape[1:])
    return whole.index_copy_(0, plain, first).index_copy_(0, taught, second)
