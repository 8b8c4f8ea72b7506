# SPDX-License-Identifier: Apache-2.0
"""The one base class of every method that decides skip plans."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from vllm_adaskip.classifiers.plan import DecoderShape, SkipPlan


class MethodOptions(BaseModel):
    """Base of a method's own options: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Classifier(ABC):
    """Decides, at prefill, the plan that a sequence follows while it decodes.

    A method is one file with a subclass: its ``Options`` (what the server may set), a
    constructor that refuses options which do not fit the model (`ValueError`), and
    `decide`, a pure function, so that every tensor-parallel rank and every repetition of
    a request gets the same plan.
    """

    Options: ClassVar[type[MethodOptions]] = MethodOptions

    @abstractmethod
    def __init__(self, shape: DecoderShape, options: MethodOptions) -> None: ...

    @abstractmethod
    def decide(self, budget: float) -> SkipPlan:
        """Give the plan for a sequence.

        Args:
            budget: largest share of decoder compute the plan may keep, in (0, 1].

        Raises:
            PlanError: the method has no plan within the budget.

        """
