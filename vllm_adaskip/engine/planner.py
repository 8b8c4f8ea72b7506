# SPDX-License-Identifier: Apache-2.0
"""From a request's arguments to its skip plan, the same in every process of an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vllm_adaskip.classifiers import METHODS, Classifier, PlanError, SkipPlan
from vllm_adaskip.classifiers.hub import located
from vllm_adaskip.engine.facts import EngineFacts
from vllm_adaskip.engine.request import REASONS, RequestArgs, RequestError


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request's arguments come to.

    Attributes:
        plan: its plan; None where the method reads the prompt first.
        budget: largest share of decoder compute that a decided plan may keep.
        gated: whether the method's `TokenGate` or `ExitGate` may leave out more, token by token.

    """

    plan: SkipPlan | None
    budget: float
    gated: bool = False


class Planner:
    """Gives each request its plan: its own, or what the server's method decides.

    What is wanted is a function of the request's arguments and the server's options alone
    (purity, invariant 5), so the front end can refuse what a worker would refuse.

    Attributes:
        refused: requests that `admit` has refused in this process, by `RequestError.reason`.

    """

    def __init__(self, facts: EngineFacts) -> None:
        method = METHODS[facts.method]
        options = method.Options.model_validate(dict(facts.method_options or {}))
        self.facts = facts
        self.dense = SkipPlan(facts.shape.num_layers)
        profile = located(facts.profile) if facts.profile else None
        self.classifier: Classifier = method(facts.shape, options, profile)
        if self.classifier.exits == "token" and facts.kv_fill == "none":
            raise ValueError(
                "kv_fill: 'none' is not allowed where each token stops by itself, because deeper "
                "tokens would read holes; allowed: 'copy', 'project'"
            )
        if facts.coalesce and not self.classifier.coalesces:
            able = ", ".join(repr(name) for name, one in METHODS.items() if one.coalesces)
            raise ValueError(
                f"coalesce: {facts.coalesce:g} is not allowed with method {facts.method!r}, which "
                f"cannot say how much worse another plan is; allowed: 0, or method {able}"
            )
        self._default = self._decided(facts.budget)
        self.refused = dict.fromkeys(REASONS, 0)

    def admit(self, extra_args: Mapping[str, Any] | None) -> None:
        """Refuse, in the front end, a request whose arguments are not allowed, and count it.

        Raises:
            RequestError: see `wanted`.

        """
        try:
            self.wanted(extra_args)
        except RequestError as error:
            self.refused[error.reason] += 1
            raise

    def wanted(self, extra_args: Mapping[str, Any] | None, *, one_answer: bool = False) -> Wanted:
        """Read a request's arguments; ``one_answer``: it asks for one token, `is_one_answer`.

        Raises:
            RequestError: an argument that is not allowed, or a plan that keeps more
                compute than the request's budget.

        """
        args = RequestArgs.parse(extra_args)
        if args.off:
            return Wanted(self.dense, 1.0)
        if args.skip is not None:
            return Wanted(self._explicit(args.skip, args.budget), 1.0)
        wanted = self._default
        if args.budget is not None:
            try:
                wanted = self._decided(min(args.budget, self.facts.budget))
            except PlanError as error:
                raise RequestError("adaskip_budget", str(error)) from None
        if one_answer and self.classifier.exits == "answer":
            return replace(wanted, gated=True)
        return wanted

    def _decided(self, budget: float) -> Wanted:
        """Let the method decide at once, unless it reads the prompt."""
        self.classifier.check(budget)
        reads = self.classifier.width > 0
        plan = None if reads else self.classifier.decide(budget, None)
        by_token = self.classifier.gates_tokens or self.classifier.exits == "token"
        return Wanted(plan, budget, by_token)

    def _explicit(self, skip: object, budget: float | None) -> SkipPlan:
        """Give the plan a request names itself; the server's budget does not bind it."""
        try:
            plan = SkipPlan.parse(skip, self.facts.shape.num_layers)
        except PlanError as error:
            raise RequestError("adaskip_skip", str(error)) from None
        kept = plan.share(self.facts.shape)
        if budget is not None and kept > budget:
            raise RequestError(
                "adaskip_budget",
                f"{budget:g} is below what adaskip_skip keeps: '{plan}' keeps "
                f"{kept:.3f} of the decoder's compute; name more to skip, or a larger budget",
            )
        return plan
