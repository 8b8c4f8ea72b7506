# SPDX-License-Identifier: Apache-2.0
"""Two replicas on Ray Serve: mixed plans, bad requests, and a worker that is killed."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from helpers.ray_app import (
    COMPLETIONS,
    PLANS,
    TO_START,
    answered,
    body,
    names,
    questions,
    replicas,
    reports,
    send,
    stream,
    wait_for,
)

from vllm_adaskip import engine_args
from vllm_adaskip.bundled import bundled_model
from vllm_adaskip.classifiers import SkipPlan

LAYERS = 12


def counts(kind: str) -> list[int]:
    """Generated tokens that ran each sub-layer of a kind, of all replicas together."""
    workers = [worker for one in reports() for worker in one["workers"]]
    return [sum(worker[kind][layer] for worker in workers) for layer in range(LAYERS)]


def test_mixed_plans_are_answered_as_offline_and_counted(
    cluster: psutil.Process, engine: Callable[..., Any]
) -> None:
    from vllm import SamplingParams

    prompts = questions(8)
    plans = [PLANS[index % len(PLANS)] for index in range(len(prompts))]
    before = reports(), counts("attn_run"), counts("mlp_run")
    replies = asyncio.run(send([body(*pair) for pair in zip(prompts, plans, strict=True)]))
    answers = [reply.json() for reply in replies if isinstance(reply, httpx.Response)]
    assert len(answers) == len(prompts)

    llm = engine(
        bundled_model(),
        skip_tokenizer_init=False,
        max_model_len=512,
        **engine_args(kv_fill="copy"),
    )
    params = [
        SamplingParams(temperature=0, max_tokens=12, extra_args={"adaskip_skip": plan})
        for plan in plans
    ]
    offline = [one.outputs[0].text for one in llm.generate(prompts, params, use_tqdm=False)]
    assert [one["choices"][0]["text"] for one in answers] == offline

    attention, mlp = [0] * LAYERS, [0] * LAYERS
    for plan, answer in zip(plans, answers, strict=True):
        mask = SkipPlan.parse(plan, LAYERS).mask().reshape(-1, 2)
        ran = answer["usage"]["completion_tokens"] - 1  # the first comes from the prompt
        for layer, (no_attention, no_mlp) in enumerate(mask):
            attention[layer] += 0 if no_attention else ran
            mlp[layer] += 0 if no_mlp else ran
    assert attention[5] < attention[0]
    assert counts("attn_run") == [a + b for a, b in zip(before[1], attention, strict=True)]
    assert counts("mlp_run") == [a + b for a, b in zip(before[2], mlp, strict=True)]

    asked = {json.dumps({"adaskip_skip": plan}): 0 for plan in PLANS}
    for old, new in zip(before[0], reports(), strict=True):
        requests = [one["workers"][0]["requests"] for one in (old, new)]
        assert requests[0] < requests[1]  # each replica had its share
        for kind in asked:
            asked[kind] += new["asked"].get(kind, 0) - old["asked"].get(kind, 0)
    assert list(asked.values()) == [plans.count(plan) for plan in PLANS]


def test_rays_metrics_page_has_the_counters(cluster: psutil.Process) -> None:
    """Where Ray tells Prometheus to look; they are asked for every few seconds."""
    (where,) = json.loads(Path("/tmp/ray/prom_metrics_service_discovery.json").read_text())
    want = sum(worker["decode_tokens"] for one in reports() for worker in one["workers"])
    assert want > 0

    def shown() -> bool:
        pages = [httpx.get(f"http://{target}/metrics").text for target in where["targets"]]
        found = re.findall(
            r"^ray_vllm_adaskip_decode_tokens_total{.*} (.*)$", "\n".join(pages), re.MULTILINE
        )
        return sum(map(float, found)) == want

    wait_for(shown, TO_START)


def test_nobody_commands_ray_without_its_token(cluster: psutil.Process) -> None:
    assert httpx.get("http://127.0.0.1:8265/api/serve/applications/").status_code == 401


@pytest.mark.parametrize(
    ("xargs", "words"),
    [
        ({"adaskip_profile": "first"}, ["adaskip_profile", "allowed: adaskip, adaskip_skip"]),
        ({"adaskip_method": "first"}, ["adaskip_method", "unknown argument"]),
        ({"adaskip_skip": [12]}, ["adaskip_skip", "12", "layers 0 to 11"]),
        ({"adaskip": "maybe"}, ["'maybe'", "'on', 'off'"]),
    ],
)
def test_a_profile_s_name_and_other_bad_arguments_are_http_400(
    cluster: psutil.Process, xargs: dict[str, Any], words: list[str]
) -> None:
    refused = httpx.post(COMPLETIONS, json=body("sum", vllm_xargs=xargs))
    assert refused.status_code == 400
    for word in words:
        assert word in refused.json()["error"]["message"]
    assert httpx.post(COMPLETIONS, json=body("sum", [5])).status_code == 200


@dataclass
class Incident:
    """What clients saw of a kill in the middle of long answers.

    Attributes:
        answers: of requests that were under way.
        streams: how each streamed answer that was under way ended.

    """

    answers: list[httpx.Response | Exception]
    streams: list[str]


async def see(kill: Callable[[], None]) -> Incident:
    long = {"max_tokens": 300, "ignore_eos": True}
    bodies = [body(prompt, PLANS[index % 5], **long) for index, prompt in enumerate(questions(4))]
    answers = asyncio.create_task(send(bodies))
    async with httpx.AsyncClient(timeout=900) as client:
        streams = [asyncio.create_task(stream(client, prompt)) for prompt in questions(1)]
        await asyncio.sleep(2)
        assert not answers.done() and not any(one.done() for one in streams)
        kill()
        while not all(map(answered, await send([body(one, [5, 6]) for one in questions(1)]))):
            await asyncio.sleep(0.5)
        return Incident(await answers, list(await asyncio.gather(*streams)))


def test_a_killed_worker_loses_no_request_silently_and_is_replaced(
    cluster: psutil.Process,
) -> None:
    old = names()
    workers = [
        process
        for process in cluster.children(recursive=True)
        if "VLLM::Worker" in " ".join(process.cmdline())
    ]
    assert len(workers) == 2
    seen = asyncio.run(asyncio.wait_for(see(workers[0].kill), TO_START))

    kept = [one for one in seen.answers if answered(one)]
    assert kept and all(one.json()["usage"]["completion_tokens"] == 300 for one in kept)
    lost = [one for one in seen.answers if not answered(one)]
    assert lost, "the killed worker had none of them"
    for one in lost:
        assert isinstance(one, httpx.Response) and one.status_code == 500
        assert "EngineDead" in one.json()["error"]["message"]
    assert "done" in seen.streams
    assert all(one == "done" or "EngineDead" in one for one in seen.streams)

    # Ray counts the dead replica as running until it asks it; then there is but one, for minutes.
    wait_for(lambda: replicas() == 2 and len(names() - old) == 1, TO_START)
    replies = asyncio.run(send([body(prompt, [5, 6]) for prompt in questions(6)]))
    assert all(map(answered, replies))
    (new,) = [one for one in reports() if one["replica"] not in old]
    assert new["workers"][0]["requests"] > 0
