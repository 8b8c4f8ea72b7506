# SPDX-License-Identifier: Apache-2.0
"""Which replica a request goes to, so that sequences that skip alike meet in one batch.

A layer's weights are saved only if no sequence of a batch needs the layer, so a batch of mixed
plans costs more than a batch whose sequences all follow one plan. Here is what a router decides
by; `deploy.ray.router` asks it for Ray Serve, benchmarks/affinity.py in a simulation.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping
from hashlib import blake2b
from typing import Any, Generic, TypeVar

from vllm_adaskip import old_names
from vllm_adaskip.classifiers import PlanError, SkipPlan

#: Requests by which a replica may be ahead of the least loaded one and still get another for the
#: sake of its plan: so many, or half of what the least loaded one has if that is more.
AHEAD = 16
#: The plan of requests that leave it to the app's options.
OPEN = ""
#: More layers than any model has; the engine, which knows the model, refuses what is too deep.
_LAYERS = 1000

Replica = TypeVar("Replica", bound=Hashable)


def plan_of(xargs: Mapping[str, Any] | None) -> str:
    """Return what a request's tokens leave out, the same text for all requests that skip alike.

    It is the plan that the request names, in one form whatever the order of its entries, or else
    its budget, or `OPEN`. So is that of arguments that the engine will refuse, wherever it runs.
    """
    try:
        xargs = old_names.renamed(xargs or {}, old_names.ARGUMENT)
    except ValueError:
        return OPEN
    if xargs.get("adaskip") == "off":
        return str(SkipPlan(_LAYERS))
    if (skip := xargs.get("adaskip_skip")) is not None:
        try:
            return str(SkipPlan.parse(skip, _LAYERS))
        except PlanError:
            return OPEN
    kept = xargs.get("adaskip_max_compute")
    named = isinstance(kept, int | float) and 0 < kept <= 1
    return f"max_compute {kept:g}" if named else OPEN


def most(least: int) -> int:
    """Return how many requests a replica may have that gets one more, by the least of all."""
    return least + max(AHEAD, least // 2)


class Affinity(Generic[Replica]):
    """Requests under way by plan and replica, and where the next one goes.

    Nothing is remembered of a plan without a request under way: a hash says where it begins. So
    clients, who make up plans, fill no memory, and replicas that come and go move no plan that
    had nothing to do with them.
    """

    def __init__(self) -> None:
        self._sent: dict[str, tuple[str, Replica]] = {}
        self._running: defaultdict[Replica, Counter[str]] = defaultdict(Counter)

    def choose(self, plan: str, loads: Mapping[Replica, int]) -> Replica:
        """Return the replica for a request with a plan; `loads` are requests that each has.

        Load goes first: the replica has no more than `most` allows. Among those it is one where
        only this plan runs; else an idle one; else one that this plan runs on already, beside the
        fewest others; else the one with the fewest. Requests that name no plan take idle replicas
        like their own, and so spread evenly where there are no others.
        """
        limit = most(min(loads.values()))

        def cost(replica: Replica) -> tuple[bool, bool, int, int, bytes]:
            load = loads[replica]
            alike = min(load, self._running[replica][plan] if replica in self._running else 0)
            others, is_new = load - alike, not alike and plan != OPEN
            return others > 0, is_new, others, load, _draw(plan, replica)

        return min((one for one in loads if loads[one] <= limit), key=cost)

    def start(self, request: str, plan: str, replica: Replica) -> bool:
        """Note that a request goes to a replica; return whether it was not known before."""
        is_new = request not in self._sent
        self.end(request)
        self._sent[request] = plan, replica
        self._running[replica][plan] += 1
        return is_new

    def moved(self, request: str, replica: Replica) -> None:
        """Note where a request has gone in the end, unless it is done by now."""
        if request in self._sent:
            self.start(request, self._sent[request][0], replica)

    def end(self, request: str) -> None:
        """Forget a request, if it is known."""
        if request not in self._sent:
            return
        plan, replica = self._sent.pop(request)
        plans = self._running[replica]
        plans[plan] -= 1
        if not plans[plan]:
            del plans[plan]
        if not plans:
            del self._running[replica]

    def under_way(self, replica: Replica) -> int:
        """Return how many requests of a replica are known."""
        return self._running[replica].total() if replica in self._running else 0


def _draw(plan: str, replica: Hashable) -> bytes:
    """Return a number that is the plan's for this replica, in every process alike."""
    return blake2b(f"{plan}\n{replica}".encode(), digest_size=8).digest()
