# SPDX-License-Identifier: Apache-2.0
"""``GET /adaskip/report``, and counters on ``/metrics``, of a server with ``--plugin adaskip``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request

from vllm_adaskip.engine.compat.metrics import worker_reports
from vllm_adaskip.serving.metrics import start_metrics

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Receive, Scope, Send

router = APIRouter()


@router.get("/adaskip/report")
async def adaskip_report(request: Request) -> list[dict[str, Any]]:
    """One dict of cumulative counters a worker."""
    reports = await worker_reports(request.app.state.engine_client)
    return [worker for engine in reports.values() for worker in engine]


class ReportMiddleware:
    """Adds the route and the counters when the server comes up; requests pass through.

    `vllm serve --middleware` takes it by name. Route and counters read what workers count; they
    take nothing from the client and run no code of it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what comes; ``lifespan`` comes once, first of all."""
        if scope["type"] == "lifespan":
            start(scope["app"])
        await self.app(scope, receive, send)


def start(app: FastAPI) -> None:
    """Add the route, and count from now on; not in a server that has no engine."""
    client = getattr(app.state, "engine_client", None)
    if client is None:
        return
    app.include_router(router)
    app.state.adaskip_metrics = start_metrics(client)
