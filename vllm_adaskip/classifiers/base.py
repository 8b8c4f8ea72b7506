# SPDX-License-Identifier: Apache-2.0
"""The one base class of every method that decides skip plans."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from vllm_adaskip.classifiers.gates import Gate, Lens
from vllm_adaskip.classifiers.plan import DecoderShape, SkipPlan

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: About which tokens a method's gate is asked: each generated ``token``, or, where a request asks
#: for one token only, the last of its prompt (``answer``), which all its prompt tokens then obey.
Scope = Literal["token", "answer"]

#: Writes what is kept of each token at one sub-layer, see `Classifier.observer`.
Observe = Callable[[int, "Tensor", "Tensor", "Tensor"], None]


class MethodOptions(BaseModel):
    """Base of a method's own options: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


@dataclass(frozen=True)
class PromptStatistics:
    """What a method observed over a whole prompt.

    Attributes:
        tokens: tokens of the prompt, at least 1.
        mean: ``[width]`` float64, mean over these tokens of what `Observe` wrote; where it is
            shown the last token alone, what it wrote of that one.
        last: ``[width]`` float64, what it wrote of the last token.

    """

    tokens: int
    mean: NDArray[np.float64]
    last: NDArray[np.float64]


class Classifier(ABC):
    """Decides, at prefill, the plan that a sequence follows while it decodes.

    A method is a subclass: its ``Options`` (what the server may set), a constructor that
    refuses options which do not fit the model (`ValueError`), `check` and `decide`. Both are
    pure functions, so that every tensor-parallel rank and every repetition of a request gets
    the same plan. A method that reads the prompt sets ``width`` and brings an `observer`; one that
    decides in the middle of a forward sets ``gate_scope`` and brings a `gate`, which adds to the
    plan; one that can say how much worse another plan is sets ``coalesces`` and brings `regrets`.
    """

    Options: ClassVar[type[MethodOptions]] = MethodOptions

    #: float32 values kept of each prompt token; 0: the method does not read the prompt.
    width: int = 0

    #: Whether `observer` is shown the last token of each prompt alone.
    last_only: bool = False

    #: Whether `regrets` compares plans, so that the sequences of a batch may share some.
    coalesces: bool = False
    #: Plans that the method has ready, whatever the prompt.
    codebook: Sequence[SkipPlan] = ()

    #: About which tokens the `gate` is asked; None: the method has none. With ``answer`` plans
    #: leave out nothing but the last layers, and such a prompt too stops where its plan does.
    gate_scope: Scope | None = None
    #: Whether the gate may also leave out attention, as tokens that exit do.
    gates_attention: bool = False

    @property
    def reads_whole_prompts(self) -> bool:
        """Whether `observer` is shown every token of each prompt."""
        return self.width > 0 and not self.last_only

    @abstractmethod
    def __init__(
        self, shape: DecoderShape, options: MethodOptions, profile: Path | None = None
    ) -> None:
        """Take the options of a method, and the folder of the profile they came with, if any."""

    @abstractmethod
    def check(self, budget: float) -> None:
        """Refuse, before the prompt is read, a budget that cannot be met.

        Args:
            budget: largest share of decoder compute the plan may keep, in (0, 1].

        Raises:
            PlanError: the method has no plan within the budget.

        """

    @abstractmethod
    def decide(self, budget: float, prompt: PromptStatistics | None) -> SkipPlan:
        """Return the plan for a sequence, within a budget that `check` let pass.

        Args:
            budget: as in `check`.
            prompt: what was observed of the prompt; None where ``width`` is 0.

        """

    def regrets(
        self, own: SkipPlan, left_out: NDArray[np.bool_], prompt: PromptStatistics
    ) -> NDArray[np.float64]:
        """Say how much worse other plans are for a prompt, by the method's own score.

        Args:
            own: the plan that was decided from this prompt.
            left_out: ``[plans, 2 * num_layers]``, each as `SkipPlan.mask`.
            prompt: what was observed of it.

        Returns:
            ``[plans]``: 0 for the own plan or a better one, 1 for one as bad as the worst of its
            size, infinite for one that leaves out what the method never does (`regret.regrets`).

        """
        raise NotImplementedError(f"{type(self).__name__} coalesces but has no regrets")

    def observer(self, hidden_size: int, device: torch.device, lens: Lens | None = None) -> Observe:
        """Return what writes down what is kept of each token, for one engine of this process.

        ``lens`` is the engine's, for methods that look through it.

        The function is called with

        - the sub-layer, attention ``2 * l``, MLP ``2 * l + 1``; each is shown once per token,
        - ``[tokens, hidden_size]`` residual stream before the sub-layer, in the model's dtype,
        - ``[tokens, hidden_size]`` what the sub-layer adds to it,
        - ``[tokens, width]`` float32, zeros at first, to write into.

        Raises:
            ValueError: the method does not fit the model.

        """
        raise NotImplementedError(f"{type(self).__name__} has width {self.width} but no observer")

    def gate(self, hidden_size: int, device: torch.device, lens: Lens) -> Gate | None:
        """Return what decides inside the forward, for one engine of this process.

        None asks about no token: with scope ``answer`` prompts still stop where their plan does.

        Raises:
            ValueError: the method does not fit the model.

        """
        raise NotImplementedError(f"{type(self).__name__} has a gate scope but no gate")
