# SPDX-License-Identifier: Apache-2.0
"""Two replicas on Ray Serve with plan affinity: plans meet, and a replica is killed under load."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import Any

import httpx
import psutil
from helpers.ray_app import (
    COMPLETIONS,
    TO_START,
    answered,
    body,
    questions,
    reports,
    send,
    stream,
    wait_for,
    wait_for_both,
)

#: The first two are one plan.
SKIPS: list[list[int | str]] = [[5, 6], [6, 5], [3, 4, 7]]


def asked() -> dict[str, list[int]]:
    """Return how often each replica was asked for each of `SKIPS`."""
    kinds = [json.dumps({"adaskip_skip": skip}) for skip in SKIPS]
    return {one["replica"]: [one["asked"].get(kind, 0) for kind in kinds] for one in reports()}


def load(**more: Any) -> list[dict[str, Any]]:
    """Return four requests for each of `SKIPS`."""
    return [
        body(prompt, SKIPS[at % 3], **more) for at, prompt in enumerate((questions(2) * 2)[:12])
    ]


def test_each_plan_meets_on_one_replica_however_it_is_written(cluster: psutil.Process) -> None:
    before = asked()
    # Ray hears of both replicas, and asks neither in the middle how busy it is.
    others = [body(prompt, [8 + at % 2]) for at, prompt in enumerate(questions(1)[:8])]
    assert all(map(answered, asyncio.run(send(others))))
    assert all(map(answered, asyncio.run(send(load()))))
    new = [[b - a for a, b in zip(before[one], now, strict=True)] for one, now in asked().items()]
    assert sorted(new) == [[0, 0, 4], [4, 4, 0]]


def test_bad_values_stay_http_400_and_streams_come(cluster: psutil.Process) -> None:
    for xargs, word in (
        ({"adaskip_skip": [12]}, "layers 0 to 11"),
        ({"adaskip_skip": ["x"]}, "adaskip_skip"),
        ({"adaskip_max_compute": 2}, "adaskip_max_compute"),
        ({"adaskip_max_compute": 10**400}, "integers"),
        ({"adaskip_profile": "first"}, "unknown argument"),
    ):
        refused = httpx.post(COMPLETIONS, json=body("sum", vllm_xargs=xargs))
        assert refused.status_code == 400
        assert word in refused.json()["error"]["message"]
    assert httpx.post(COMPLETIONS, json=body("sum")).status_code == 200

    async def streamed() -> str:
        async with httpx.AsyncClient(timeout=900) as client:
            return await stream(client, questions(1)[0])

    assert asyncio.run(streamed()) == "done"


def test_a_killed_replica_loses_no_request_silently_and_its_plans_move(
    cluster: psutil.Process,
) -> None:
    before = asked()
    actors = [
        process
        for process in cluster.children(recursive=True)
        if "ServeReplica:adaskip:AdaSkipServer" in " ".join(process.cmdline())
    ]
    assert len(actors) == 2
    engines = actors[0].children(recursive=True)
    try:
        replies = asyncio.run(asyncio.wait_for(see(actors[0]), TO_START))
    finally:
        for one in engines:  # they may outlive it
            with suppress(psutil.NoSuchProcess):
                one.kill()
    kept, lost = [one for one in replies if answered(one)], []
    for one in replies:
        if not answered(one):
            assert isinstance(one, httpx.Response) and one.status_code >= 500 and one.text, one
            lost.append(one)
    assert kept and lost
    assert all(one.json()["usage"]["completion_tokens"] == 300 for one in kept)

    # Whatever plan is asked for, the replica that is left answers, until there is another.
    assert all(map(answered, asyncio.run(send(load()))))
    wait_for(reports, TO_START)  # once Ray has noticed
    now = asked()
    (left,) = now.keys() & before.keys()
    for old, new in zip(before[left], now[left], strict=True):
        assert new >= old + 4
    wait_for_both()
    assert all(map(answered, asyncio.run(send(load()))))


async def see(replica: psutil.Process) -> list[Any]:
    """Kill a replica in the middle of long answers, and return what came of them."""
    answers = asyncio.create_task(send(load(max_tokens=300, ignore_eos=True)))
    await asyncio.sleep(2)
    assert not answers.done()
    replica.kill()
    replies: list[Any] = await answers
    return replies
