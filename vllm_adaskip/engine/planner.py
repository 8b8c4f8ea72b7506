# SPDX-License-Identifier: Apache-2.0
"""From a request's arguments to its skip plan, the same in every process of an engine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vllm_adaskip.classifiers import METHODS, Classifier, DecoderShape, PlanError, SkipPlan
from vllm_adaskip.engine.request import RequestArgs, RequestError


@dataclass(frozen=True)
class PlannerConfig:
    """Plain facts a `Planner` is made from, so that they can travel between processes."""

    shape: DecoderShape
    method: str = "none"
    method_options: Mapping[str, Any] | None = None
    budget: float = 1.0

    def to_json(self) -> str:
        """Write the facts as JSON text."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> PlannerConfig:
        """Read what `to_json` wrote."""
        facts = json.loads(text)
        return cls(**{**facts, "shape": DecoderShape(**facts["shape"])})


class Planner:
    """Gives each request its plan: its own, or what the server's method decides.

    A plan is a function of the request's arguments and the server's options alone
    (purity, invariant 5), so the front end can refuse what a worker would refuse.
    """

    def __init__(self, config: PlannerConfig) -> None:
        method = METHODS[config.method]
        options = method.Options.model_validate(dict(config.method_options or {}))
        self.config = config
        self.dense = SkipPlan(config.shape.num_layers)
        self._classifier: Classifier = method(config.shape, options)
        self._default = self._classifier.decide(config.budget)

    def plan_for(self, extra_args: Mapping[str, Any] | None) -> SkipPlan:
        """Give the plan of a request.

        Raises:
            RequestError: an argument that is not allowed, or a plan that keeps more
                compute than the request's budget.

        """
        args = RequestArgs.parse(extra_args)
        if args.off:
            return self.dense
        if args.skip is not None:
            return self._explicit(args.skip, args.budget)
        if args.budget is None:
            return self._default
        try:
            return self._classifier.decide(min(args.budget, self.config.budget))
        except PlanError as error:
            raise RequestError(f"adaskip_budget: {error}") from None

    def _explicit(self, skip: object, budget: float | None) -> SkipPlan:
        """Give the plan a request names itself; the server's budget does not bind it."""
        try:
            plan = SkipPlan.parse(skip, self.config.shape.num_layers)
        except PlanError as error:
            raise RequestError(f"adaskip_skip: {error}") from None
        kept = plan.share(self.config.shape)
        if budget is not None and kept > budget:
            raise RequestError(
                f"adaskip_budget: {budget:g} is below what adaskip_skip keeps: '{plan}' keeps "
                f"{kept:.3f} of the decoder's compute; name more to skip, or a larger budget"
            )
        return plan
