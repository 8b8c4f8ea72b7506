# SPDX-License-Identifier: Apache-2.0
"""Every command of the README is run: here, in test_server.py, or by .ci/run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from readme import ROOT, block, blocks

PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def test_every_shell_command_has_somebody_who_runs_it() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    for text in blocks("bash"):
        if text.startswith("make"):
            assert all(line in ci for line in text.splitlines())
        else:
            assert text.startswith(
                ("vllm serve", "curl -s http://127.0.0.1:8000/", "adaskip doctor")
            )


def test_doctor_finds_all_well_where_the_tests_run() -> None:
    done = subprocess.run(
        ["bash", "-c", block("adaskip doctor")],
        env={**os.environ, "PATH": PATH, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for word in ("Python", "vLLM", "model runner", "V1", "vllm.general_plugins", "all is well"):
        assert word in done.stdout


def test_the_offline_example_runs_and_reports() -> None:
    (code,) = blocks("python")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "'method': 'static', " in done.stdout or "'method': 'static'}" in done.stdout
