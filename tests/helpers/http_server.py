# SPDX-License-Identifier: Apache-2.0
"""A server for tests, started by a user's command."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import httpx
import pytest

from helpers.readme import ENVIRONMENT, ROOT

URL = "http://127.0.0.1:8000"


@contextmanager
def serving(
    command: str,
    log: Path,
    ready: str | None = "/health",
    *,
    cwd: Path = ROOT,
    more: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[subprocess.Popen[bytes]]:
    """Start it, wait until it answers there (or not at all), and stop it as Ctrl-C would.

    ``more``: of its environment.
    Servers listen on the port that the docs name, so processes that share the tests take turns.
    """
    with (Path(tempfile.gettempdir()) / "adaskip-tests.lock").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        with _started(command, log, ready, cwd, {**ENVIRONMENT, **more}) as process:
            yield process


@contextmanager
def _started(
    command: str, log: Path, ready: str | None, cwd: Path, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("w") as out:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            cwd=cwd,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # A background process ignores interrupts, and hands that on to its children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        if ready is not None:
            _wait_until_up(process, log, ready)
        yield process
    except BaseException:
        print(log.read_text()[-3000:])  # shown beside what failed
        raise
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt it; what is still there after a minute is killed."""
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)


def _wait_until_up(process: subprocess.Popen[bytes], log: Path, ready: str) -> None:
    for _ in range(900):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            if httpx.get(f"{URL}{ready}").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(1)
    pytest.fail("no server after 900 s:\n" + log.read_text()[-3000:])
