# SPDX-License-Identifier: Apache-2.0
"""An app on Ray Serve, started and asked by the commands of docs/deploy.md."""

from __future__ import annotations

import json
import secrets
import subprocess
import time
from collections.abc import Callable
from typing import Any

from helpers.readme import ENVIRONMENT, ROOT, block

PAGE = "docs/deploy.md"
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


#: Seconds that replicas may take to start; a busy machine was seen to need over four minutes.
TO_START = 600


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
        # What is asked may be a process of its own, which would slow down what it waits for.
        time.sleep(2)


def body(prompt: str, plan: object = None, **more: Any) -> dict[str, Any]:
    """Return a greedy completion request."""
    common = {"model": "bundled", "prompt": prompt, "temperature": 0, "max_tokens": 12}
    return {**common, "vllm_xargs": {} if plan is None else {"adaskip_skip": plan}, **more}
