# SPDX-License-Identifier: Apache-2.0
"""Brings what the workers count to the server's ``/metrics``.

Workers count for `adaskip_report` anyway. They are asked for it every few seconds, between
two steps, so that a forward has nothing more to do; and ``/metrics`` shows what they said
last, so that it never waits for an engine.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from vllm.logger import init_logger

from vllm_adaskip.engine.compat.metrics import metric_classes, speaks_for_workers, worker_reports
from vllm_adaskip.engine.naming import planner_of
from vllm_adaskip.serving.counters import ServerCounters

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

logger = init_logger("vllm.adaskip")

#: Seconds between an answer of the workers and the next question; Prometheus comes every 15.
PERIOD: Final = 5.0


def start_metrics(client: EngineClient) -> asyncio.Task[None] | None:
    """Count from now on, for an engine of ours, in the event loop that serves it.

    `vllm serve` does so by itself. A server of your own calls this once a process, and
    keeps what it returns, which runs until it is cancelled. None under ``--disable-log-stats``.
    """
    if (kinds := metric_classes(client)) is None:
        return None
    counters = ServerCounters(*kinds, str(client.model_config.served_model_name))
    return asyncio.create_task(_show(client, counters))


async def _show(client: EngineClient, counters: ServerCounters) -> None:
    """Show all figures. A task, because a loop that ends cancels those without a word."""
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_show_refused(client, counters))
        if speaks_for_workers(client):
            tasks.create_task(_show_reports(client, counters))


async def _show_refused(client: EngineClient, counters: ServerCounters) -> None:
    planner = planner_of(client.vllm_config)  # the one that the front end asks
    while True:
        counters.show_refused(planner.refused)
        await asyncio.sleep(PERIOD)


async def _show_reports(client: EngineClient, counters: ServerCounters) -> None:
    """Ask, wait for the answer, rest: before an engine that hangs nothing piles up."""
    is_down = False
    while True:
        try:
            reports = await worker_reports(client)
        except Exception as error:
            if not is_down:
                logger.warning("vllm-adaskip: workers do not answer, counters rest: %r", error)
            is_down = True
        else:
            is_down = False
            for engine, workers in reports.items():
                counters.show_report(engine, workers[0])
        await asyncio.sleep(PERIOD)
