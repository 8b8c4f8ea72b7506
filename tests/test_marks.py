# SPDX-License-Identifier: Apache-2.0
"""Which tests can do without vLLM, as `tests/conftest.py` marks them by what their files import."""

from __future__ import annotations

import pytest
from helpers.needs import TESTS, needed


@pytest.mark.parametrize(
    ("file", "vllm", "torch"),
    [
        ("test_config.py", False, False),
        ("bench/test_counting.py", False, True),  # by safetensors.torch
        ("evaluation/test_evidence.py", False, True),  # by a benchmark that it loads by name
        ("engine/test_step.py", False, True),
        ("engine/test_request.py", True, True),  # by a module of ours
        ("engine/test_meaning.py", True, True),  # by helpers, in a function
    ],
)
def test_what_a_file_needs_is_read_off_its_imports(file: str, vllm: bool, torch: bool) -> None:
    found = needed(TESTS / file)
    assert ("vllm" in found, "torch" in found) == (vllm, torch)


@pytest.mark.parametrize("mark", ["pure", "engine", "slow"])
def test_every_mark_is_registered(request: pytest.FixtureRequest, mark: str) -> None:
    assert [line for line in request.config.getini("markers") if line.startswith(f"{mark}:")]
    assert request.node.get_closest_marker("pure") and not request.node.get_closest_marker("slow")
