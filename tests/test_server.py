# SPDX-License-Identifier: Apache-2.0
"""`vllm serve --plugin adaskip` as the README starts it: compiled, over HTTP."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from readme import ENVIRONMENT, block

URL = "http://127.0.0.1:8000"
LAYERS = 12


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start the server with the README's own command; give the path of its log."""
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            ["bash", "-c", "exec " + block("vllm serve")],
            env=ENVIRONMENT,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until_up(process, log)
        yield str(log)
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(60)


def wait_until_up(process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(300):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            if httpx.get(f"{URL}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(1)
    pytest.fail("no server after 300 s:\n" + log.read_text()[-3000:])


def shell(command: str) -> str:
    done = subprocess.run(
        ["bash", "-c", command], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    return done.stdout


def report() -> dict[str, Any]:
    (worker,) = httpx.get(f"{URL}/adaskip/report").json()
    return worker


def complete(prompt: str, xargs: dict[str, Any] | None = None, **more: Any) -> httpx.Response:
    body = {"model": "bundled", "prompt": prompt, "temperature": 0, "max_tokens": 12, **more}
    return httpx.post(f"{URL}/v1/completions", json={**body, "vllm_xargs": xargs}, timeout=60)


def test_the_readmes_completion_skips_what_it_names(server: str) -> None:
    before = report()
    answer = json.loads(shell(block("curl -s http://127.0.0.1:8000/v1/completions")))
    (after,) = json.loads(shell(block("curl -s http://127.0.0.1:8000/adaskip/report")))
    generated = answer["usage"]["completion_tokens"] - 1  # the first comes from the prompt
    assert generated > 0 and after["decode_tokens"] - before["decode_tokens"] == generated
    for kind, skipped in (("attn_run", {5, 6, 7}), ("mlp_run", {5, 6})):
        ran = [new - old for new, old in zip(after[kind], before[kind], strict=True)]
        assert ran == [0 if layer in skipped else generated for layer in range(LAYERS)]


def test_the_start_says_what_is_in_force(server: str) -> None:
    log = Path(server).read_text()
    assert "vllm-adaskip: AdaSkipLlamaForCausalLM, method none, budget 1, kv_fill none" in log


def test_chat_takes_plans_too(server: str) -> None:
    before = report()
    body = {
        "model": "bundled",
        "messages": [{"role": "user", "content": "sum : 2 6 + 7 1 = ?"}],
        "max_tokens": 6,
        "ignore_eos": True,
        "vllm_xargs": {"adaskip_skip": ["mlp:3"]},
    }
    assert httpx.post(f"{URL}/v1/chat/completions", json=body, timeout=60).status_code == 200
    ran = [new - old for new, old in zip(report()["mlp_run"], before["mlp_run"], strict=True)]
    assert ran == [0 if layer == 3 else 5 for layer in range(LAYERS)]


@pytest.mark.parametrize(
    ("xargs", "words"),
    [
        ({"adaskip_skip": list(range(LAYERS))}, ["adaskip_skip", "all 24 sub-layers"]),
        ({"adaskip_skip": [12]}, ["adaskip_skip", "12", "layers 0 to 11"]),
        ({"adaskip_skip": ["attn:99"]}, ["'attn:99'", "layers 0 to 11"]),
        ({"adaskip_skip": "5-6"}, ["adaskip_skip", "'5-6'", "a list"]),
        ({"adaskip_skip": ["banana"]}, ["'banana'", "attn:7"]),
        ({"adaskip_skip": [5.5]}, ["5.5"]),
        ({"adaskip_skp": [5]}, ["adaskip_skp", "did you mean adaskip_skip"]),
        ({"adaskip": "maybe"}, ["'maybe'", "'on', 'off'"]),
        ({"adaskip_budget": 2}, ["adaskip_budget", "2", "(0, 1]"]),
        ({"adaskip_budget": 0.5}, ["adaskip_budget", "method 'none'"]),
    ],
)
def test_a_bad_argument_is_http_400_and_says_what_is_allowed(
    server: str, xargs: dict[str, Any], words: list[str]
) -> None:
    refused = complete("sum : 2 6 + 7 1 = ? answer :", xargs)
    assert refused.status_code == 400
    for word in words:
        assert word in refused.json()["error"]["message"]


def test_others_go_on_untouched_by_bad_requests_and_by_clients_that_leave(server: str) -> None:
    from vllm_adaskip.testbed.tasks import TASKS, samples

    prompts = [one.prompt for task in TASKS for one in samples(task, "test", 3, 3)]
    plans: list[list[int | str]] = [[], [3], ["attn:4", "mlp:7"], [5, 6, 7]]
    jobs = [(prompt, {"adaskip_skip": plans[i % 4]}) for i, prompt in enumerate(prompts)]
    want = [complete(*job).json()["choices"][0]["text"] for job in jobs]

    def leave(prompt: str) -> None:
        body = {"model": "bundled", "prompt": prompt, "max_tokens": 400, "ignore_eos": True}
        body |= {"stream": True, "vllm_xargs": {"adaskip_skip": [1, 2]}}
        with httpx.stream("POST", f"{URL}/v1/completions", json=body, timeout=60) as stream:
            next(stream.iter_lines())

    with ThreadPoolExecutor(16) as pool:
        nuisance = [pool.submit(leave, prompt) for prompt in prompts[:6]]
        nuisance += [pool.submit(complete, prompt, {"adaskip_skip": [77]}) for prompt in prompts]
        got = list(pool.map(lambda job: complete(*job), jobs))
        for one in nuisance:
            one.result()
    assert [answer.status_code for answer in got] == [200] * len(jobs)
    texts = [answer.json()["choices"][0]["text"] for answer in got]
    # bf16 sums depend on the batch's shape, in stock vLLM too: a near tie may fall otherwise.
    assert sum(a == b for a, b in zip(texts, want, strict=True)) >= len(jobs) - 1


def test_the_server_listens_on_loopback_only(server: str) -> None:
    assert "http://127.0.0.1:8000" in Path(server).read_text()
