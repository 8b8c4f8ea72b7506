# SPDX-License-Identifier: Apache-2.0
"""The README and the pages that it leads to: what runs their commands, and that they agree."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from textwrap import indent

import pytest
from helpers.readme import ENVIRONMENT, ROOT, block, blocks

from vllm_adaskip.engine.request import KEYS
from vllm_adaskip.support import markdown

TUTORIAL, SERVE, OFFLINE = "docs/tutorial.md", "docs/serve.md", "docs/offline.md"


@pytest.mark.parametrize("page", ["README.md", TUTORIAL, SERVE, OFFLINE])
def test_every_shell_command_is_run(page: str) -> None:
    """By .ci/run, by test_server.py, which reads docs/serve.md, or below."""
    ci = (ROOT / ".ci" / "run").read_text()
    for text in blocks("bash", page):
        if text.startswith("make"):
            assert all(line in ci for line in text.splitlines())
        elif text.startswith("export"):
            name, value = text.removeprefix("export ").strip().split("=")
            assert ENVIRONMENT[name] == value
        elif text.startswith("adaskip get"):
            assert text in ci
        elif text.startswith("adaskip doctor"):
            assert text == block("adaskip doctor", TUTORIAL)
        else:
            assert text.startswith(("vllm serve", "curl -s http://127.0.0.1:8000/"))
            assert text in blocks("bash", SERVE)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_the_readme_installs_extras_that_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    named = re.findall(r"\.\[([\w,-]+)\]", (ROOT / "README.md").read_text())
    assert len(named) == 2 and {name for one in named for name in one.split(",")} <= extras.keys()


def test_the_support_table_is_the_registry_s() -> None:
    page = (ROOT / "docs" / "families.md").read_text()
    start = page.index("| architecture |")
    assert page[start : page.index("\n\n", start) + 1] == markdown()


def test_the_tables_of_options_are_the_models() -> None:
    """By the script that the page names, in a process that finds no torch and no vLLM."""
    page = ROOT / "docs" / "options.md"
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'vllm')));"
        f"sys.path.insert(0, {str(ROOT / 'deploy' / 'site')!r}); import options;"
        "sys.stdout.write(options.rewritten(sys.stdin.read()))"
    )
    text = page.read_text()
    done = subprocess.run(
        [sys.executable, "-c", code], input=text, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == text
    assert len(re.findall("^<!-- options:", text, re.MULTILINE)) == 8 + 6


def test_every_argument_of_a_request_has_its_row() -> None:
    page = (ROOT / "docs" / "options.md").read_text()
    rows = re.findall(r"^\| `(adaskip\w*)` \|", page, re.MULTILINE)
    assert rows == list(KEYS)


def test_the_gains_are_drawn_from_the_readmes_table() -> None:
    spec = importlib.util.spec_from_file_location("gains", ROOT / "benchmarks" / "gains.py")
    assert spec is not None and spec.loader is not None
    gains = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gains)
    found = gains.rows((ROOT / "README.md").read_text())
    slower = [row.time for row in found if row.time > 1]
    assert len(found) == 15 and slower == [1.04, 1.71, 1.18, 1.07, 1.22]
    assert {"3 of 12 layers", "8 of 30 MLPs, healed"} <= {row.left_out for row in found}


@pytest.mark.engine
def test_doctor_finds_all_well_where_the_tests_run() -> None:
    done = subprocess.run(
        ["bash", "-c", block("adaskip doctor", TUTORIAL)],
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


def test_the_readmes_program_is_of_the_offline_example() -> None:
    (code,), (excerpt,) = blocks("python", OFFLINE), blocks("python")
    assert indent(excerpt, "    ") in code


@pytest.mark.engine
def test_the_offline_example_runs_and_reports(tmp_path: Path) -> None:
    (code,) = blocks("python", OFFLINE)
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
