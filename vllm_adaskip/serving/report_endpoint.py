# SPDX-License-Identifier: Apache-2.0
"""Entry point ``vllm.endpoint_plugins``: ``GET /adaskip/report``, and counters on ``/metrics``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI, HTTPException, Request

from vllm_adaskip.engine.compat.metrics import worker_reports
from vllm_adaskip.serving.metrics import start_metrics

if TYPE_CHECKING:
    from argparse import Namespace

    from starlette.datastructures import State
    from vllm.engine.protocol import EngineClient

router = APIRouter()


@router.get("/adaskip/report")
async def adaskip_report(request: Request) -> list[dict[str, Any]]:
    """One dict of cumulative counters a worker."""
    client = request.app.state.adaskip_engine
    if client is None:
        raise HTTPException(404, "this server was started without --plugin adaskip")
    reports = await worker_reports(client)
    return [worker for engine in reports.values() for worker in engine]


class ReportEndpoint:
    """Adds the route and the counters.

    Both read what workers count; they take nothing from the client and run no code of it.
    """

    name = "adaskip"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the route."""
        app.include_router(router)

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Remember the engine, if it is one of ours, and count from now on."""
        ours = "adaskip" in (getattr(args, "additional_config", None) or {})
        state.adaskip_engine = engine_client if ours else None
        if state.adaskip_engine is not None:
            state.adaskip_metrics = start_metrics(state.adaskip_engine)
