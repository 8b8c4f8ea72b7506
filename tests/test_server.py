# SPDX-License-Identifier: Apache-2.0
"""`vllm serve --plugin adaskip` as docs/serve.md starts it: compiled, over HTTP."""

from __future__ import annotations

import asyncio
import json
import random
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from helpers.http_server import URL, serving
from helpers.metrics_page import MetricsPage, scrape_until, wait_for_page
from helpers.readme import ENVIRONMENT, block

from vllm_adaskip.serving.metrics import PERIOD

PAGE = "docs/serve.md"
LAYERS = 12
REFUSED = "refused_requests"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start the server with the page's own command; return the path of its log."""
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(block("vllm serve", PAGE), log):
        yield str(log)
    assert "never retrieved" not in log.read_text()


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
    return httpx.post(f"{URL}/v1/completions", json={**body, "vllm_xargs": xargs}, timeout=300)


def test_the_pages_completion_skips_what_it_names(server: str) -> None:
    before = report()
    answer = json.loads(shell(block("curl -s http://127.0.0.1:8000/v1/completions", PAGE)))
    (after,) = json.loads(shell(block("curl -s http://127.0.0.1:8000/adaskip/report", PAGE)))
    generated = answer["usage"]["completion_tokens"] - 1  # the first comes from the prompt
    assert generated > 0 and after["decode_tokens"] - before["decode_tokens"] == generated
    for kind, skipped in (("attn_run", {5, 6, 7}), ("mlp_run", {5, 6})):
        ran = [new - old for new, old in zip(after[kind], before[kind], strict=True)]
        assert ran == [0 if layer in skipped else generated for layer in range(LAYERS)]


def test_the_start_says_what_is_in_force(server: str) -> None:
    log = Path(server).read_text()
    method = "AdaSkipLlamaForCausalLM, method none, profile none, max_compute 1, kv_fill none"
    assert f"vllm-adaskip: {method}" in log


def test_metrics_agree_with_the_report_and_count_refusals(server: str) -> None:
    before = wait_for_page([report()])
    complete("sum : 2 6 + 7 1 = ? answer :", {"adaskip_skip": [3, "mlp:4"]})
    complete("sum : 2 6 + 7 1 = ? answer :", {"adaskip": "off"})
    for refused in ({"adaskip_skip": [99]}, {"adaskip_skip": "x"}, {"adaskip_a": 1}):
        assert complete("sum", refused).status_code == 400
    assert complete("sum", {"adaskip_skip": [99]}, n=4, temperature=1).status_code == 400
    wait_for_page([report()])
    page = scrape_until(lambda page: page.total(REFUSED) == before.total(REFUSED) + 4)

    def grown(name: str, **labels: str) -> int:
        return page.total(name, **labels) - before.total(name, **labels)

    assert grown("requests", plan="skipping") == grown("requests", plan="dense") == 1
    assert grown("rows_skipped", kind="attention") * 2 == grown("rows_skipped", kind="mlp") > 0
    assert grown(REFUSED, reason="adaskip_skip") == 3
    assert grown(REFUSED, reason="unknown") == 1


def test_the_dashboards_metrics_stand_on_the_page(server: str) -> None:
    from helpers.dashboard import selectors

    page = MetricsPage()
    # These two begin with the first answer that a canary reads; test_counters.py has them.
    unread = {"vllm:adaskip_canary_agreement", "vllm:adaskip_canary_surprise"}
    for selector in selectors():
        if selector.name in unread:
            continue
        assert selector.name in page.labels
        assert {matcher.name for matcher in selector.matchers.matchers} <= page.labels[
            selector.name
        ]


def test_metrics_do_not_wait_for_an_engine_that_hangs(server: str) -> None:
    (engine,) = [
        process
        for process in psutil.Process().children(recursive=True)
        if process.name().startswith("VLLM::EngineC")
    ]
    before = wait_for_page([report()])
    engine.suspend()
    try:
        assert complete("sum", {"adaskip_skip": [99]}).status_code == 400
        for _ in range(3):  # in the meantime the workers are asked
            time.sleep(PERIOD / 2)
            page = MetricsPage()
    finally:
        engine.resume()
    assert page.total(REFUSED) == before.total(REFUSED) + 1
    assert page.total("decode_tokens") == before.total("decode_tokens")
    assert complete("sum : 2 6 + 7 1 = ? answer :").status_code == 200
    wait_for_page([report()])


def test_chat_takes_plans_too(server: str) -> None:
    before = report()
    body = {
        "model": "bundled",
        "messages": [{"role": "user", "content": "sum : 2 6 + 7 1 = ?"}],
        "max_tokens": 6,
        "ignore_eos": True,
        "vllm_xargs": {"adaskip_skip": ["mlp:3"]},
    }
    assert httpx.post(f"{URL}/v1/chat/completions", json=body, timeout=300).status_code == 200
    ran = [new - old for new, old in zip(report()["mlp_run"], before["mlp_run"], strict=True)]
    assert ran == [0 if layer == 3 else 5 for layer in range(LAYERS)]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_an_answer_says_what_its_request_got(server: str, path: str) -> None:
    chat = {"messages": [{"role": "user", "content": "sum"}]}
    asked = {"prompt": "sum : 1"} if path == "completions" else chat
    body = {"model": "bundled", "max_tokens": 3, **asked}

    def told(**xargs: Any) -> Any:
        answer = httpx.post(f"{URL}/v1/{path}", json={**body, "vllm_xargs": xargs}, timeout=300)
        return answer.json()["kv_transfer_params"]

    assert told(adaskip_skip=[5, "attn:7"]) is None
    found = told(adaskip_skip=[5, "attn:7"], adaskip_show_plan="on")["adaskip"]
    assert found["skip"] == [5, "attn:7"] and 0.8 < found["compute"] < 0.95


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
        ({"adaskip_max_compute": 2}, ["adaskip_max_compute", "2", "(0, 1]"]),
        ({"adaskip_max_compute": 0.5}, ["adaskip_max_compute", "method 'none'"]),
        ({"adaskip_budget": 0.5}, ["adaskip_max_compute", "method 'none'"]),
    ],
)
def test_a_bad_argument_is_http_400_and_says_what_is_allowed(
    server: str, xargs: dict[str, Any], words: list[str]
) -> None:
    refused = complete("sum : 2 6 + 7 1 = ? answer :", xargs)
    assert refused.status_code == 400
    for word in words:
        assert word in refused.json()["error"]["message"]


async def flood(jobs: list[dict[str, Any]]) -> list[httpx.Response]:
    """Send all at once: far more than fit the batch, so that the waiting queue fills."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(limits=limits, timeout=900) as client:
        sent = [client.post(f"{URL}/v1/completions", json=job) for job in jobs]
        return list(await asyncio.gather(*sent))


def start_streaming(prompt: str) -> subprocess.Popen[bytes]:
    """A client of its own process, in the middle of a long answer."""
    body = {"model": "bundled", "prompt": prompt, "max_tokens": 400, "ignore_eos": True}
    body |= {"stream": True, "vllm_xargs": {"adaskip_skip": [1, 2]}}
    client = subprocess.Popen(
        ["curl", "-sN", f"{URL}/v1/completions", "--json", json.dumps(body)],
        stdout=subprocess.PIPE,
    )
    assert client.stdout is not None and b"data" in client.stdout.readline()
    return client


def test_killed_clients_bad_plans_and_a_full_queue_cost_the_others_nothing(server: str) -> None:
    """And leave no row behind in the sequence table."""
    from vllm_adaskip.lab.testbed.tasks import TASKS, samples

    prompts = [one.prompt for task in TASKS for one in samples(task, "test", 3, 4)]
    plans: list[list[int | str]] = [[], [3], ["attn:4", "mlp:7"], [5, 6, 7]]
    pairs = [(prompt, {"adaskip_skip": plans[i % 4]}) for i, prompt in enumerate(prompts)]
    want = [complete(*pair).json()["choices"][0]["text"] for pair in pairs]
    common = {"model": "bundled", "temperature": 0, "max_tokens": 12}
    good = [{**common, "prompt": prompt, "vllm_xargs": args} for prompt, args in pairs]
    bad = [
        {**common, "prompt": "sum", "vllm_xargs": {"adaskip_skip": [n % 12, "x"]}}
        for n in range(99)
    ]

    clients = [start_streaming(prompt) for prompt in prompts[:6]]
    long = {**common, "max_tokens": 64, "ignore_eos": True, "temperature": 1, "n": 32}
    crowd = [{**long, "prompt": prompt, "vllm_xargs": args} for prompt, args in pairs[::2]]
    jobs = [*enumerate(good)] * 4 + [(-1, job) for job in bad]
    random.Random(0).shuffle(jobs)
    jobs = [(-2, job) for job in crowd] + jobs
    before = waited()
    answers = asyncio.run(asyncio.wait_for(with_kills([job for _, job in jobs], clients), 900))
    # A cumulative figure: how long the queue was at some moment, a look may miss.
    assert waited() - before > 30, "nothing ever waited"
    same = 0
    for (index, _), answer in zip(jobs, answers, strict=True):
        if index == -1:
            assert answer.status_code == 400 and "'x'" in answer.json()["error"]["message"]
            continue
        assert answer.status_code == 200
        if index >= 0:
            same += answer.json()["choices"][0]["text"] == want[index]
    # bf16 sums depend on the batch's shape, in stock vLLM too: a near tie may fall otherwise.
    assert same >= 0.97 * 4 * len(good)

    for _ in range(1000):  # the killed clients' sequences end when vLLM notices
        if report()["live_rows"] == 0:
            break
        time.sleep(0.1)
    assert report()["live_rows"] == 0
    assert complete(*pairs[1]).json()["choices"][0]["text"] == want[1]


async def with_kills(
    jobs: list[dict[str, Any]], clients: list[subprocess.Popen[bytes]]
) -> list[httpx.Response]:
    """Send the jobs, and kill the clients while they are worked on."""
    answers = asyncio.create_task(flood(jobs))
    for victim in clients:
        await asyncio.sleep(0.2)
        assert not answers.done()
        victim.kill()
        victim.communicate()
    return await answers


def waited() -> float:
    """Seconds that all requests so far have waited for a place in the batch."""
    metrics = httpx.get(f"{URL}/metrics", timeout=300).text
    total = re.search(r"^vllm:request_queue_time_seconds_sum{.*} (.*)$", metrics, re.MULTILINE)
    assert total is not None
    return float(total[1])


def test_bench_times_a_running_server(server: str) -> None:
    """Every plan by itself, and both in one batch."""
    before = report()
    said = shell(
        "adaskip bench server --skip '[5, 6]' --skip '[\"mlp:3\"]' --concurrency 4 "
        "--prompt 8 --tokens 5 --rounds 2"
    )
    assert "dense" in said and "skip [5, 6]" in said and "2 plans mixed" in said
    after = report()
    assert after["decode_tokens"] - before["decode_tokens"] == 192  # 4 variants, 3 turns, 4 x 4
    ran = [new - old for new, old in zip(after["mlp_run"], before["mlp_run"], strict=True)]
    # One of four variants leaves it out for all, one for every second request.
    assert ran == [192 - 72 if layer in (3, 5, 6) else 192 for layer in range(LAYERS)]


@pytest.mark.parametrize("command", ["adaskip bench server --url", "vllm bench serve"])
def test_the_pages_benchmarks_of_a_server_run(server: str, command: str) -> None:
    before = report()
    shell(block(command, "docs/performance.md"))
    after = report()
    assert (
        after["attn_run"][5] - before["attn_run"][5] < after["attn_run"][0] - before["attn_run"][0]
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--skip 5-6", "'5-6' is no plan"),
        ("--skip '[99]'", "the server refused"),
        ("--url http://127.0.0.1:1", "does not answer as a vLLM server"),
    ],
)
def test_bench_says_what_is_wrong(server: str, options: str, words: str) -> None:
    command = f"adaskip bench server --concurrency 1 --rounds 2 {options}"
    done = subprocess.run(["bash", "-c", command], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2 and words in " ".join(done.stderr.split())


def test_the_server_listens_on_loopback_only(server: str) -> None:
    assert "http://127.0.0.1:8000" in Path(server).read_text()
