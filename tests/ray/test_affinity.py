# SPDX-License-Identifier: Apache-2.0
"""Where requests go by their plans: what `Affinity` promises, and Ray's router around it."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve._private.common import (
    DeploymentHandleSource,
    DeploymentID,
    ReplicaID,
    RequestMetadata,
)
from ray.serve.request_router import PendingRequest

from deploy.ray.affinity import AHEAD, OPEN, Affinity, most, plan_of
from deploy.ray.router import AffinityRouter

PLANS = [OPEN, *(f"plan {number}" for number in range(5))]


class Cluster:
    """Replicas and their requests, as one router sees them."""

    def __init__(self, *replicas: str) -> None:
        self.affinity: Affinity[str] = Affinity()
        self.requests: dict[str, deque[tuple[str, str]]] = {one: deque() for one in replicas}
        self.sent = 0

    @property
    def loads(self) -> dict[str, int]:
        return {replica: len(requests) for replica, requests in self.requests.items()}

    def plans(self, replica: str) -> Counter[str]:
        return Counter(plan for _, plan in self.requests[replica])

    def send(self, plan: str) -> str:
        replica = self.affinity.choose(plan, self.loads)
        self.sent += 1
        self.affinity.start(str(self.sent), plan, replica)
        self.requests[replica].append((str(self.sent), plan))
        return replica

    def end(self, replica: str) -> None:
        """End the request that this replica has had for longest, if it has any."""
        if self.requests[replica]:
            self.affinity.end(self.requests[replica].popleft()[0])

    def lose(self, replica: str) -> None:
        for request, _ in self.requests.pop(replica):
            self.affinity.end(request)


events = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.sampled_from(PLANS)),
        st.tuples(st.sampled_from(["end", "lose", "join"]), st.integers(0, 5).map(str)),
    ),
    max_size=120,
)


@given(events)
def test_every_request_gets_a_live_replica_that_is_not_far_ahead(
    events: list[tuple[str, str]],
) -> None:
    cluster = Cluster("0", "1", "2")
    for event, which in events:
        if event == "send":
            before = cluster.loads
            replica = cluster.send(which)
            assert replica in before
            assert before[replica] <= most(min(before.values()))
        elif event == "join":
            cluster.requests.setdefault(which, deque())
        elif which in cluster.requests and event == "end":
            cluster.end(which)
        elif which in cluster.requests and len(cluster.requests) > 1:
            cluster.lose(which)
    for replica in list(cluster.requests):
        assert cluster.affinity.under_way(replica) == len(cluster.requests[replica])
        cluster.lose(replica)
    assert vars(cluster.affinity) == vars(Affinity())  # nothing is left of any plan


def test_the_bound_is_a_few_requests_or_half_of_the_least() -> None:
    assert [most(least) for least in (0, 4, 16, 40)] == [AHEAD, 4 + AHEAD, 32, 60]
    cluster = Cluster("a", "b")
    home = cluster.send("x")
    while len(cluster.requests[home]) <= AHEAD:
        assert cluster.send("x") == home
    assert cluster.send("x") != home


@given(st.lists(st.sampled_from(PLANS), min_size=1, max_size=40), st.integers(1, 8))
def test_a_plan_that_runs_alone_always_comes_to_the_same_replica(
    plans: list[str], replicas: int
) -> None:
    cluster = Cluster(*map(str, range(replicas)))
    home: dict[str, str] = {}
    for plan in plans:
        replica = cluster.send(plan)
        assert home.setdefault(plan, replica) == replica
        cluster.end(replica)


@given(st.integers(2, 8), st.data())
def test_a_replica_that_goes_moves_its_own_plans_only(replicas: int, data: st.DataObject) -> None:
    names = [str(number) for number in range(replicas)]
    gone = data.draw(st.sampled_from(names))
    affinity: Affinity[str] = Affinity()
    for plan in map(str, range(30)):
        before = affinity.choose(plan, dict.fromkeys(names, 0))
        after = affinity.choose(plan, {one: 0 for one in names if one != gone})
        assert after == before if before != gone else after != gone


def test_plans_keep_their_replicas_while_they_run() -> None:
    cluster = Cluster("a", "b", "c")
    homes = {plan: cluster.send(plan) for plan in ("x", "y", "z")}
    assert len(set(homes.values())) == 3
    draw = random.Random(1)
    for _ in range(200):
        plan = draw.choice(list(homes))
        assert cluster.send(plan) == homes[plan]
        if len(cluster.requests[homes[plan]]) > 3:
            cluster.end(homes[plan])


def turnover(cluster: Cluster, plans: int, turns: int) -> float:
    """Keep 24 requests a replica under way; return plans in a batch, in the mean of the 2nd half.

    Requests end in any order.
    """
    draw, found = random.Random(1), []
    for turn in range(turns):
        if turn >= 24 * len(cluster.requests):
            places = [one for one, mine in cluster.requests.items() if mine]
            weights = [len(cluster.requests[one]) for one in places]
            (replica,) = draw.choices(places, weights)
            cluster.requests[replica].rotate(draw.randrange(100))
            cluster.end(replica)
        cluster.send(f"plan {draw.randrange(plans)}")
        if turn > turns // 2:
            found += [len(cluster.plans(one)) for one in cluster.requests]
    return sum(found) / len(found)


@pytest.mark.parametrize(("replicas", "plans", "at_most"), [(2, 2, 1.6), (16, 8, 1.8), (2, 6, 4)])
def test_under_load_batches_hold_few_plans(replicas: int, plans: int, at_most: float) -> None:
    """Spread evenly, a batch of 24 would hold nearly all of them."""
    assert turnover(Cluster(*map(str, range(replicas))), plans, 6000) < at_most


def test_requests_that_name_no_plan_spread_over_all_replicas_without_others() -> None:
    cluster = Cluster("a", "b", "c")
    for _ in range(9):
        cluster.send(OPEN)
    assert set(cluster.loads.values()) == {3}
    cluster.send("x")
    cluster.send("x")
    (shared,) = [one for one in cluster.requests if cluster.plans(one)["x"]]
    for _ in range(6):
        assert cluster.send(OPEN) != shared


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"adaskip_skip": [5, 6]}, {"adaskip_skip": [6, 5, 5]}),
        ({"adaskip_skip": ["mlp:5", "attn:5"]}, {"adaskip_skip": [5], "adaskip_max_compute": 0.5}),
        ({"adaskip": "off"}, {"adaskip_skip": []}),
        ({"adaskip_max_compute": 1}, {"adaskip_max_compute": 1.0, "other": "x"}),
        ({"adaskip_budget": 0.5}, {"adaskip_max_compute": 0.5}),  # its old name
        ({"adaskip_budget": 0.5, "adaskip_max_compute": 0.5}, None),  # which engines refuse
        (None, {"adaskip": "on"}),
    ],
)
def test_arguments_that_mean_the_same_are_the_same_plan(one: Any, other: Any) -> None:
    assert plan_of(one) == plan_of(other)


def test_plans_that_differ_are_told_apart() -> None:
    skips: list[Any] = [[], [5], ["attn:5"], [5, 6]]
    named = [{"adaskip_skip": skip} for skip in skips]
    assert len({plan_of(one) for one in [None, *named, {"adaskip_max_compute": 0.5}]}) == 6


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=5),
)


@given(st.dictionaries(st.sampled_from(["adaskip", "adaskip_skip", "adaskip_max_compute"]), values))
def test_whatever_a_client_sends_is_some_plan(xargs: dict[str, Any]) -> None:
    assert isinstance(plan_of(xargs), str)


@pytest.mark.parametrize("number", [10**400, -(10**400)])
def test_a_huge_number_is_left_to_the_engine(number: int) -> None:
    assert plan_of({"adaskip_max_compute": number}) == plan_of({"adaskip_skip": [number]}) == OPEN


@dataclass
class FakeReplica:
    """As much of Ray's `RunningReplica` as a choice looks at."""

    replica_id: ReplicaID


@dataclass
class FakeBody:
    """A request's body."""

    vllm_xargs: Any


def test_ray_s_router_sends_by_plan_and_forgets_what_is_done() -> None:
    asyncio.run(_router())


async def _router() -> None:
    deployment = DeploymentID(name="d", app_name="a")
    router = AffinityRouter(deployment, DeploymentHandleSource.REPLICA)
    router.initialize_state()
    replicas: Any = [FakeReplica(ReplicaID(name, deployment)) for name in ("r0", "r1", "r2")]

    def pending(number: int, skip: list[int]) -> PendingRequest:
        metadata = RequestMetadata(request_id=f"{number}", internal_request_id=f"i{number}")
        return PendingRequest([FakeBody({"adaskip_skip": skip})], {}, metadata)

    async def place(request: PendingRequest) -> str:
        ((first,),) = await router.choose_replicas(replicas, request)
        return str(first.replica_id.unique_id)

    x = [pending(number, [5, 6] if number % 2 else [6, 5]) for number in range(4)]
    y = pending(4, [7])
    (home,) = {await place(one) for one in x}
    other = await place(y)
    assert other != home
    # Ray's word on a replica's load counts, and this replica is far ahead.
    router.replica_queue_len_cache.update(replicas[int(home[1])].replica_id, 2 * AHEAD)
    assert await place(pending(5, [5, 6])) not in (home, other)
    router.replica_queue_len_cache.invalidate_key(replicas[int(home[1])].replica_id)

    (third,) = {"r0", "r1", "r2"} - {home, other}
    affinity = router._affinity
    assert [affinity.under_way(one) for one in (home, other, third)] == [4, 1, 1]
    x[0].future.cancel()  # a client that left before Ray had sent its request
    await asyncio.sleep(0)
    router.on_request_completed(replicas[0].replica_id, "i1")
    router.on_request_routed(x[2], ReplicaID(third, deployment), None)
    router.on_request_routed(x[1], ReplicaID(third, deployment), None)  # said too late
    assert [affinity.under_way(one) for one in (home, other, third)] == [1, 1, 2]
    assert await router.choose_replicas(replicas, None) == [replicas]
    # Asked once more, as the replica did not answer: it is tried again, and then the others.
    (first,), rest = await router.choose_replicas(replicas, x[3])
    assert {one.replica_id.unique_id for one in [first, *rest]} == {"r0", "r1", "r2"}
    assert sum(affinity.under_way(one) for one in ("r0", "r1", "r2")) == 4
