# SPDX-License-Identifier: Apache-2.0
"""A server for tests, started by a user's command."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from readme import ENVIRONMENT

URL = "http://127.0.0.1:8000"


@contextmanager
def serving(command: str, log: Path) -> Iterator[None]:
    """Start it, wait until it is up, and stop it as Ctrl-C would."""
    with log.open("w") as out:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            env=ENVIRONMENT,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_up(process, log)
        yield
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(60)


def _wait_until_up(process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(300):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            if httpx.get(f"{URL}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(1)
    pytest.fail("no server after 300 s:\n" + log.read_text()[-3000:])
