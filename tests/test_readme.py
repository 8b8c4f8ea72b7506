# SPDX-License-Identifier: Apache-2.0
"""Every command of the README is run: here, in test_server.py, or by .ci/run."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.readme import ENVIRONMENT, ROOT, block, blocks

from vllm_adaskip.support import markdown


def test_every_shell_command_has_somebody_who_runs_it() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    for text in blocks("bash"):
        if text.startswith("make"):
            assert all(line in ci for line in text.splitlines())
        elif text.startswith("export"):
            name, value = text.removeprefix("export ").strip().split("=")
            assert ENVIRONMENT[name] == value
        elif text.startswith("adaskip get"):
            assert text in ci
        else:
            assert text.startswith(
                ("vllm serve", "curl -s http://127.0.0.1:8000/", "adaskip doctor")
            )


def test_the_support_table_is_the_registry_s() -> None:
    readme = (ROOT / "README.md").read_text()
    start = readme.index("| architecture |")
    assert readme[start : readme.index("\n\n", start) + 1] == markdown()


@pytest.mark.engine
def test_doctor_finds_all_well_where_the_tests_run() -> None:
    done = subprocess.run(
        ["bash", "-c", block("adaskip doctor")],
        env={**ENVIRONMENT, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for word in (
        "Python",
        "vLLM",
        "model runner",
        "V1",
        "vllm.general_plugins",
        "Qwen3ForCausalLM",
        "all is well",
    ):
        assert word in done.stdout


@pytest.mark.engine
def test_the_offline_example_runs_and_reports(tmp_path: Path) -> None:
    (code,) = blocks("python")
    script = tmp_path / "example.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, script], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    printed = [line for line in done.stdout.splitlines() if line.startswith(("[", "{"))]
    answers, report = map(ast.literal_eval, printed)
    assert answers[1] == " skwyn wyndrosk drodroeth ornull wyneth ullull etheth"
    assert report["method"] == "static" and report["requests"] == 3
    generated = report["decode_tokens"]
    assert 0 < report["attn_run"][5] < report["attn_run"][4] == generated
    assert report["mlp_run"][5] < report["attn_run"][5]  # the third request skips it too
