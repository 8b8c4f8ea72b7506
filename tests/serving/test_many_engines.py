# SPDX-License-Identifier: Apache-2.0
"""Counters of a server with two front ends and two data-parallel engines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from helpers.http_server import URL, serving
from helpers.metrics_page import MetricsPage, scrape_until, wait_for_page


@pytest.fixture(scope="module", autouse=True)
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    command = (
        "adaskip serve --enforce-eager --served-model-name bundled --api-server-count 2 "
        "--data-parallel-size 2"
    )
    with serving(command, tmp_path_factory.mktemp("server") / "log"):
        yield


def status(skip: list[Any] | None) -> int:
    body = {"model": "bundled", "prompt": "sum : 2 6 + 7 1 = ? answer :", "max_tokens": 6}
    body |= {"ignore_eos": True, "vllm_xargs": {"adaskip_skip": skip} if skip else None}
    return httpx.post(f"{URL}/v1/completions", json=body, timeout=300).status_code


def test_every_engine_is_counted_once_whichever_front_end_answers() -> None:
    for _ in range(8):
        assert status(None) == 200
        assert status([3, "mlp:4"]) == 200
    for _ in range(12):  # the kernel chooses a front end for each
        assert status([99]) == 400
    reports = httpx.get(f"{URL}/adaskip/report").json()
    assert len(reports) == 2 and all(report["decode_tokens"] for report in reports)
    assert sum(report["decode_tokens"] for report in reports) == 16 * 5
    page = wait_for_page(reports)
    assert page.total("requests", plan="skipping") == 8
    scrape_until(lambda page: page.total("refused_requests", reason="adaskip_skip") == 12)
    assert MetricsPage().total("refused_requests") == 12


def test_both_front_ends_show_the_same() -> None:
    pages = [MetricsPage() for _ in range(6)]
    assert len({(page.total("prompt_tokens"), page.total("rows_run")) for page in pages}) == 1
