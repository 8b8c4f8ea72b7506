# SPDX-License-Identifier: Apache-2.0
"""The simulation of plan affinity: what it must show whatever the costs are."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest
from helpers.readme import ROOT, block
from typer.testing import CliRunner

PAGE = "docs/deploy.md"


@pytest.fixture(scope="module")
def simulation() -> ModuleType:
    """Return benchmarks/affinity.py, which is a program and in no package."""
    spec = importlib.util.spec_from_file_location("simulation", ROOT / "benchmarks/affinity.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look there for their types
    spec.loader.exec_module(module)
    return module


def of_kinds(rows: Mapping[int, int], prompts: int) -> float:
    """Return a step that costs what its plans cost, each as much."""
    return float(len(rows))


def test_policies_differ_only_where_mixing_costs_something(simulation: ModuleType) -> None:
    def ratio(cost: object) -> float:
        even, affinity = (simulation.run(cost, 4, 2, routers, 2000)[0] for routers in (0, 1))
        return float(affinity / even)

    assert ratio(of_kinds) > 1.3
    assert 0.9 < ratio(lambda rows, prompts: 1.0) < 1.1


@pytest.mark.parametrize("routers", [0, 1, 2])
def test_every_request_is_answered_and_takes_its_steps(
    simulation: ModuleType, routers: int
) -> None:
    """At a rate so low that nobody waits, an answer takes as many steps as it has tokens."""
    answers, seconds = simulation.run(lambda rows, prompts: 1.0, 2, 2, routers, 500, 0.001)
    assert answers == pytest.approx(0.001, rel=0.2)
    assert len(seconds) == 500 - 100 - 2 * simulation.ROWS
    assert min(seconds) >= 64 and max(seconds) <= 192 + 1


def test_a_step_of_the_roofline_needs_what_its_rows_need(simulation: ModuleType) -> None:
    cost = simulation.roofline(0.5, 4, 256)
    one, mixed = cost(Counter({0: 32}), 0), cost(Counter({0: 8, 1: 8, 2: 8, 3: 8}), 0)
    assert cost(Counter({1: 32}), 0) == pytest.approx(one)
    # All weights of an 8B decoder in bfloat16, and something for K/V.
    whole = cost(Counter({0: 32}), 1)
    assert one < mixed < whole
    assert 15e9 / simulation.H100[0] < whole < 20e9 / simulation.H100[0]
    assert 1.6 < whole / one < 2
    assert simulation.roofline(0.5, 4, 0)(Counter({0: 32}), 1) < whole


def test_measured_steps_are_kept_and_lines_between_them(simulation: ModuleType) -> None:
    costs = {"rows": [1, 9], "plans": [1, 3], "steps": [[1.0, 3.0], [5.0, 11.0]], "token": 0.5}
    cost = simulation.measured(costs, 4)
    assert cost({0: 1}, 0) == 1 and cost({0: 3, 1: 3, 2: 3}, 0) == 11
    assert cost({0: 3, 1: 2}, 0) == pytest.approx((3 + 7) / 2)
    assert cost({0: 99}, 0) == 5 and cost({0: 1}, 2) == 1 + 2 * 4 * 0.5


def test_the_table_and_the_file(simulation: ModuleType, tmp_path: Path) -> None:
    command = block("python benchmarks/affinity.py simulate", PAGE)
    _, _, what, costs, out = shlex.split(command)
    few = ["--replicas", "2", "--plans", "2", "--requests", "20"]
    out = str(tmp_path / out)
    done = CliRunner().invoke(simulation.cli, [what, str(ROOT / costs), out, *few])
    assert done.exit_code == 0 and "measured, CPU" in done.output
    found = json.loads(Path(out).read_text())
    assert len(found) == 3 and all(one["replicas"] == one["plans"] == 2 for one in found)
