# SPDX-License-Identifier: Apache-2.0
"""vLLM's counters and gauges, and how a server reaches the workers of all its engines."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient


class Kinds(NamedTuple):
    """The classes of vLLM's own metrics, called as those of prometheus_client."""

    counter: Any
    gauge: Any


def metric_classes(client: EngineClient) -> Kinds | None:
    """Return the classes of vLLM's own metrics; None under ``--disable-log-stats``.

    These are prometheus_client's, or under Ray Serve such that hand on to Ray's metrics.
    Since 0.29. Remove when a stat logger may ask workers.
    """
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    manager = getattr(client, "logger_manager", None)
    loggers = manager.stat_loggers if manager else ()
    found = (one for one in loggers if isinstance(one, PrometheusStatLogger))
    return next((Kinds(one._counter_cls, one._gauge_cls) for one in found), None)


def speaks_for_workers(client: EngineClient) -> bool:
    """Return whether, of API server processes with the same engines, this one asks the engines.

    Since 0.29. Remove when the engine client says which of how many it is.
    """
    rank: int = client.vllm_config.parallel_config._api_process_rank
    return rank <= 0


async def worker_reports(client: EngineClient) -> dict[int, list[dict[str, Any]]]:
    """Return ``adaskip_report`` of each worker of each data-parallel engine, by engine index.

    `EngineClient.collective_rpc` answers for the first engine alone.
    Since 0.29. Remove when it answers for all.
    """
    core: Any = client.engine_core
    call = ("collective_rpc", "adaskip_report", None, (), None)
    asked = [core._call_utility_async(*call, engine=engine) for engine in core.core_engines]
    return dict(zip(core.engine_ranks_managed, await asyncio.gather(*asked), strict=True))
