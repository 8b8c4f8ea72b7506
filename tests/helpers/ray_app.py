# SPDX-License-Identifier: Apache-2.0
"""An app on Ray Serve, started and asked by the commands of docs/deploy.md."""

from __future__ import annotations

import asyncio
import json
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from helpers.http_server import URL, serving
from helpers.readme import ENVIRONMENT, ROOT, block
from vllm_adaskip.lab.testbed.tasks import TASKS, samples

PAGE = "docs/deploy.md"
COMPLETIONS = f"{URL}/v1/completions"
#: Ray reports nothing to anybody, and its token is the tests' own.
ENVIRONMENT.update(
    RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32)
)
PLANS: list[list[int | str]] = [[], [5, 6], [5, 6, "attn:7"], ["mlp:4", "mlp:5"], [3, 4, 5, 6, 7]]


def shell(command: str) -> str:
    """Run a command in the repository's root; give what it prints."""
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def reports() -> list[dict[str, Any]]:
    """Return what each replica says of itself, by the page's own command."""
    printed = shell(block("python -m deploy.ray.report", PAGE).strip())
    return [json.loads(line) for line in printed.splitlines() if line.startswith("{")]


def names() -> set[str]:
    """Return the replicas that answer."""
    return {one["replica"] for one in reports()}


def replicas() -> int:
    """Return how many replicas are up, by Ray's dashboard: who waits would slow them by more."""
    headers = {"Authorization": f"Bearer {ENVIRONMENT['RAY_AUTH_TOKEN']}"}
    url = "http://127.0.0.1:8265/api/serve/applications/"
    try:
        apps = httpx.get(url, headers=headers, timeout=30).json()["applications"]
    except (httpx.TransportError, ValueError, KeyError):
        return 0
    return sum(
        replica["state"] == "RUNNING"
        for app in apps.values()
        for name, deployment in app["deployments"].items()
        if name.startswith("AdaSkipServer:")
        for replica in deployment["replicas"]
    )


#: Seconds that replicas may take to start; a busy machine was seen to need over five minutes.
TO_START = 900


def wait_for(what: Callable[[], Any], seconds: float) -> float:
    """Ask until it is so; give the seconds that it took."""
    start = time.monotonic()
    while True:
        try:
            if what():
                return time.monotonic() - start
            trouble = "not so"
        except AssertionError as error:
            trouble = str(error)
        assert time.monotonic() - start < seconds, trouble[-3000:]
        time.sleep(2)


def wait_for_both() -> None:
    """Wait until both replicas are up."""
    wait_for(lambda: replicas() == 2, TO_START)


def body(prompt: str, plan: object = None, **more: Any) -> dict[str, Any]:
    """Return a greedy completion request."""
    common = {"model": "bundled", "prompt": prompt, "temperature": 0, "max_tokens": 12}
    return {**common, "vllm_xargs": {} if plan is None else {"adaskip_skip": plan}, **more}


@contextmanager
def deployed(folder: Path, **args: Any) -> Iterator[psutil.Process]:
    """Start Ray and deploy the app, two replicas in float32, so that answers can be compared."""
    config = yaml.safe_load((ROOT / "deploy/ray/serve.yaml").read_text())
    config["applications"][0]["args"] |= {"max_replicas": 2, **args}
    config["applications"][0]["args"]["engine_kwargs"]["dtype"] = "float32"
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    start = block("PYTHONPATH=$PWD ray start", PAGE).strip()
    deploy = block("serve deploy", PAGE).strip()
    deploy = deploy.replace("deploy/ray/serve.yaml", str(folder / "serve.yaml"))
    shell(block("export RAY_AUTH_MODE", PAGE))
    started: list[psutil.Process] = []
    try:
        with serving(f"env {start}", folder / "log", ready=None) as process:
            try:
                wait_for(lambda: shell(deploy), TO_START)
                wait_for_both()
                yield psutil.Process(process.pid)
            finally:
                started = psutil.Process(process.pid).children(recursive=True)
    finally:
        for one in started:  # whatever of Ray outlives it would be joined by the next test
            with suppress(psutil.NoSuchProcess):
                one.kill()
        # Ray notes where it was, and others would follow; `ray stop` is for all of them.
        Path("/tmp/ray/ray_current_cluster").unlink(missing_ok=True)


def questions(each: int) -> list[str]:
    """Return so many prompts of each task."""
    return [one.prompt for task in TASKS for one in samples(task, "test", 5, each)]


async def send(bodies: list[dict[str, Any]]) -> list[Any]:
    """Send all at once; an answer or an error for each."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(limits=limits, timeout=900) as client:
        sent = [client.post(COMPLETIONS, json=one) for one in bodies]
        return await asyncio.gather(*sent, return_exceptions=True)


async def stream(client: httpx.AsyncClient, prompt: str) -> str:
    """Return how a streamed answer ended: ``done``, or an error that the client sees."""
    request = body(prompt, [5], stream=True, max_tokens=300, ignore_eos=True)
    last = ""
    try:
        async with client.stream("POST", COMPLETIONS, json=request) as reply:
            async for line in reply.aiter_lines():
                last = line or last
    except httpx.TransportError as error:
        return f"error: {error!r}"
    return "done" if last == "data: [DONE]" else f"error: {last}"


def answered(reply: httpx.Response | Exception) -> bool:
    """Return whether that is an answer, and no error."""
    return isinstance(reply, httpx.Response) and reply.status_code == 200
