# SPDX-License-Identifier: Apache-2.0
"""What the tokens of a prompt leave out, but for its last ones. Pure.

For long prompts and short answers nearly all time goes into reading. The last tokens run
everything, as the answer comes from them; their attention reads what the others wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_adaskip.classifiers.plan import PlanError, SkipPlan, shown

#: Last tokens of a prompt that run everything, where no number is given.
TAIL = 16


class BusyOptions(BaseModel):
    """From when to when prompts are shortened.

    Attributes:
        enter: shortening begins when so many prompts wait or are being read.
        leave: it ends when so many are left; fewer than ``enter``, so that it does not flap.

    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    enter: int = Field(ge=1)
    leave: int = Field(ge=0)

    @model_validator(mode="after")
    def _in_order(self) -> BusyOptions:
        if self.leave >= self.enter:
            raise ValueError("'leave' must be less than 'enter'")
        return self


class Busy:
    """Whether prompts are shortened now, as they come in."""

    def __init__(self, options: BusyOptions) -> None:
        self._options = options
        self.now = False

    def saw(self, unread: int) -> bool:
        """Take how many prompts wait or are being read; return whether `now` has changed."""
        before = self.now
        self.now = unread > self._options.leave if before else unread >= self._options.enter
        return self.now != before


class PromptOptions(BaseModel):
    """The server's option ``prompt``.

    Attributes:
        exit: first layers, which a prompt's tokens run; they leave out the others.
        skip: what a prompt's tokens leave out, in the form of ``adaskip_skip``;
            one of ``exit`` and ``skip`` is needed.
        tail: last tokens of a prompt that run everything.
        shortest: tokens of the shortest prompt that is shortened, written ``from``.
        busy: shorten prompts only while many prompts wait or are being read; always by default.

    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    exit: int | None = None
    skip: list[int | str] | None = None
    tail: int = Field(default=TAIL, ge=1)
    shortest: int = Field(default=0, ge=0, alias="from")
    busy: BusyOptions | None = None

    @model_validator(mode="after")
    def _one_way(self) -> PromptOptions:
        if (self.exit is None) == (self.skip is None):
            raise ValueError("needs 'exit' or 'skip', and not both")
        return self


@dataclass(frozen=True, slots=True)
class PromptPlan:
    """A plan for the tokens of a prompt.

    Attributes:
        plan: what they leave out.
        tail: last tokens of the prompt that run everything; at least one.
        shortest: tokens of the shortest prompt that it is for.

    """

    plan: SkipPlan
    tail: int = TAIL
    shortest: int = 0

    @classmethod
    def of_options(cls, options: Mapping[str, Any], num_layers: int) -> PromptPlan | None:
        """Read the option ``prompt``, as `PromptOptions`; None: it leaves out nothing.

        Raises:
            PlanError: it names layers that this model has not.

        """
        read = PromptOptions.model_validate(dict(options))
        try:
            plan = named_plan(read.exit, read.skip, num_layers)
        except PlanError as error:
            raise PlanError(f"prompt: {error}") from None
        return None if plan.is_dense else cls(plan, read.tail, read.shortest)

    def full_from(self, prompt_len: int) -> int:
        """Return the first position of a prompt whose token runs everything; 0: all do."""
        return max(prompt_len - self.tail, 0) if prompt_len >= self.shortest else 0

    def mark(self, full_from: int, end: int) -> bytes:
        """Return what tells a block of the prefix cache from those of other prompt plans.

        Args:
            full_from: of the block's prompt, see there.
            end: position behind the block's last token.

        """
        mark = f"prompt {self.plan.attention:x} {self.plan.mlp:x}"
        return (mark if end <= full_from else f"{mark} to {full_from}").encode()


def named_plan(exit: object | None, skip: object | None, num_layers: int) -> SkipPlan:
    """Return the plan that is named by how many layers run, or else by what is left out.

    Raises:
        PlanError: the model cannot follow it.

    """
    return exit_plan(exit, num_layers) if skip is None else SkipPlan.parse(skip, num_layers)


def exit_plan(layers: object, num_layers: int) -> SkipPlan:
    """Return the plan that runs so many first layers.

    Raises:
        PlanError: not an integer from 1 to ``num_layers``, which is the whole model.

    """
    if not isinstance(layers, int) or isinstance(layers, bool) or not 1 <= layers <= num_layers:
        raise PlanError(
            f"{shown(layers)} is not allowed; allowed: 1 to {num_layers}, the layers that a "
            f"prompt's tokens run ({num_layers}: all of this model's)"
        )
    above = (1 << num_layers) - (1 << layers)
    return SkipPlan(num_layers, above, above)


def exit_of(plan: SkipPlan) -> int | None:
    """Return how many first layers a plan runs and no others; None: it is no exit."""
    layers = plan.num_layers - plan.attention.bit_count()
    return layers if layers and plan == exit_plan(layers, plan.num_layers) else None


def as_tail(value: object) -> int:
    """Return how many last tokens run everything.

    Raises:
        PlanError: not an integer from 1 on.

    """
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 1 << 31:
        raise PlanError(
            f"{shown(value)} is not allowed; allowed: 1 or more, as an answer begins with what the "
            "whole model makes of the prompt's last token"
        )
    return value
