# SPDX-License-Identifier: Apache-2.0
"""Ray Serve's request router for `affinity: true`: plans choose replicas, see `Affinity`."""

from __future__ import annotations

from functools import partial
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from deploy.ray.affinity import Affinity, plan_of


class AffinityRouter(RequestRouter):
    """Sends requests that skip alike to the same replica, as far as its load allows.

    Each process that sends requests to replicas has a router of its own. It knows the plans of
    those it sent itself, and from each replica's answers how many requests that has in all.
    """

    def initialize_state(self) -> None:
        """Begin with no request under way; Ray calls it once."""
        self._affinity: Affinity[str] = Affinity()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return the plan's replica; from the second time on all others too, should it be silent.

        Ray asks a replica that it has not heard of for ten seconds, and waits a tenth of a second.
        """
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        plan = plan_of(_xargs(pending_request))
        by_name = {one.replica_id.unique_id: one for one in candidate_replicas}
        name = self._affinity.choose(plan, {key: self._load(one) for key, one in by_name.items()})
        request = pending_request.metadata.internal_request_id
        is_first = self._affinity.start(request, plan, name)
        pending_request.future.add_done_callback(partial(self._end_cancelled, request))
        first = by_name.pop(name)
        return [[first]] if is_first else [[first], list(by_name.values())]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """Note where it went: not where it should if that replica did not answer."""
        self._affinity.moved(pending_request.metadata.internal_request_id, replica_id.unique_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Forget a request that is done, with or without an error."""
        self._affinity.end(internal_request_id)

    def _load(self, replica: RunningReplica) -> int:
        """Return how many requests a replica has: as it said last, or more, as some are chosen for.

        What it said is forgotten after ten seconds, and does not hold requests not sent yet.
        """
        said = self.replica_queue_len_cache.get(replica.replica_id) or 0
        return max(said, self._affinity.under_way(replica.replica_id.unique_id))

    def _end_cancelled(self, request: str, future: Any) -> None:
        if future.cancelled():  # before it was sent, which Ray does not report
            self._affinity.end(request)


def _xargs(pending_request: PendingRequest) -> Any:
    """Return the arguments of an OpenAI request; None where a call is of another kind."""
    return getattr(pending_request.args[0], "vllm_xargs", None) if pending_request.args else None
