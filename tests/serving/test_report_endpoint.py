# SPDX-License-Identifier: Apache-2.0
"""The report's middleware in servers that are made up; `tests/test_server.py` asks a real one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from vllm_adaskip.serving import report_endpoint
from vllm_adaskip.serving.report_endpoint import ReportMiddleware


@pytest.fixture
def app() -> FastAPI:
    made = FastAPI()
    made.add_middleware(ReportMiddleware)
    return made


def test_with_an_engine_it_adds_the_route_and_counts_from_the_start(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def asked(core: Any, *call: Any, engine: int) -> list[dict[str, int]]:
        assert call[1] == "adaskip_report"
        return [{"decode_tokens": engine}]

    core = SimpleNamespace(core_engines=[7, 8], engine_ranks_managed=[0, 1])
    core._call_utility_async = lambda *call, engine: asked(core, *call, engine=engine)
    app.state.engine_client = client = SimpleNamespace(engine_core=core)
    counted: list[Any] = []
    monkeypatch.setattr(report_endpoint, "start_metrics", counted.append)
    with TestClient(app) as server:
        assert counted == [client]
        assert server.get("/adaskip/report").json() == [{"decode_tokens": 7}, {"decode_tokens": 8}]
        assert "/adaskip/report" in server.get("/openapi.json").json()["paths"]


def test_a_server_without_an_engine_is_left_alone(app: FastAPI) -> None:
    with TestClient(app) as server:
        assert server.get("/adaskip/report").status_code == 404
