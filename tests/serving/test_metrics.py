# SPDX-License-Identifier: Apache-2.0
"""When workers are asked, and what happens when they do not answer."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from prometheus_client import REGISTRY, generate_latest
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.prometheus import unregister_vllm_metrics

from vllm_adaskip import DecoderShape
from vllm_adaskip.engine import naming
from vllm_adaskip.engine.naming import planner_of
from vllm_adaskip.engine.request import EngineFacts, RequestError
from vllm_adaskip.serving import metrics

REPORT = {
    "num_layers": 2,
    "prompt_tokens": 5,
    "decode_tokens": 3,
    "attn_run": [3, 3],
    "mlp_run": [3, 1],
    "plans": {"dense": 1, "skipping": 1, "gated": 0},
}
MLPS_SKIPPED = 'vllm:adaskip_rows_skipped_total{engine="%d",kind="mlp",model_name="m"} '
REFUSED = 'vllm:adaskip_refused_requests_total{model_name="m",reason="unknown"} '


class Client:
    """As vLLM's of a server: two data-parallel engines, each of two tensor-parallel workers."""

    def __init__(self, *, rank: int = 0, log_stats: bool = True) -> None:
        named = [
            naming.class_path(
                "vllm_adaskip.engine.v1", "V1Feeder", EngineFacts(DecoderShape(2, 1, 3))
            )
        ]
        self.vllm_config = self.engine_core = self.model_config = self.parallel_config = self
        self.served_model_name, self.logits_processors = "m", named
        self.speculative_config = None
        self._api_process_rank = rank
        logger = PrometheusStatLogger.__new__(PrometheusStatLogger)
        self.stat_loggers = [object(), logger]
        self.logger_manager = self if log_stats else None
        self.core_engines, self.engine_ranks_managed = [b"a", b"b"], [0, 1]
        self.asked = 0
        self.answer: Callable[[], Any] = asyncio.Event().wait

    async def _call_utility_async(self, method: str, *args: Any, engine: bytes) -> Any:
        assert (method, args) == ("collective_rpc", ("adaskip_report", None, (), None))
        self.asked += engine == b"a"
        return await self.answer()


async def answered() -> list[dict[str, Any]]:
    return [REPORT, REPORT]


@pytest.fixture(autouse=True)
def without_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    unregister_vllm_metrics()
    monkeypatch.setattr(metrics, "PERIOD", 0.01)
    yield
    unregister_vllm_metrics()


def page_after(client: Any, seconds: float = 0.2) -> str:
    """What a scrape finds while the counters run."""

    async def scrape() -> str:
        running = metrics.start_metrics(client)
        assert running is not None
        await asyncio.sleep(seconds)
        page = generate_latest(REGISTRY).decode()
        assert not running.done()
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
        return page

    return asyncio.run(scrape())


def refuse(client: Any) -> None:
    with pytest.raises(RequestError):
        planner_of(client).admit({"adaskip_what": 1})


def test_each_engine_counts_and_ranks_count_once() -> None:
    client = Client()
    client.answer = answered
    page = page_after(client)
    assert client.asked > 2
    assert MLPS_SKIPPED % 0 + "2.0" in page and MLPS_SKIPPED % 1 + "2.0" in page
    assert 'adaskip_decode_tokens_total{engine="2"' not in page


def test_an_engine_that_hangs_is_asked_once_and_holds_up_nobody() -> None:
    client = Client()
    before = planner_of(client).refused["unknown"]
    refuse(client)
    page = page_after(client)
    assert client.asked == 1
    assert f"{REFUSED}{before + 1:.1f}" in page
    assert "rows_skipped_total{" not in page


def test_counters_go_on_after_an_engine_failed_and_say_so_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(metrics.logger, "warning", lambda text, error: warnings.append(text))
    client = Client()

    async def fail_at_first() -> Any:
        if client.asked < 4:
            raise RuntimeError("dead")
        return await answered()

    client.answer = fail_at_first
    assert MLPS_SKIPPED % 0 + "2.0" in page_after(client)
    assert len(warnings) == 1


def test_of_several_server_processes_one_asks_and_each_counts_refusals() -> None:
    client = Client(rank=1)
    client.answer = answered
    refuse(client)
    page = page_after(client)
    assert client.asked == 0
    assert REFUSED in page


@pytest.mark.parametrize("seconds", [0, 0.05])
@pytest.mark.parametrize("answers", [True, False])
def test_a_loop_that_ends_while_counters_run_says_nothing(
    caplog: pytest.LogCaptureFixture, recwarn: Any, seconds: float, answers: bool
) -> None:
    """As a server's loop does at SIGINT and SIGTERM: it cancels what still runs."""

    def serve_and_stop() -> None:
        client: Any = Client()
        if answers:
            client.answer = answered

        async def serve() -> None:
            client.counting = metrics.start_metrics(client)
            await asyncio.sleep(seconds)

        asyncio.run(serve())
        assert client.counting.cancelled()

    serve_and_stop()
    gc.collect()
    assert not caplog.records and not [str(each.message) for each in recwarn]


def test_without_vllms_statistics_there_are_none_of_ours() -> None:
    client: Any = Client(log_stats=False)
    assert metrics.start_metrics(client) is None
    assert b"adaskip" not in generate_latest(REGISTRY)
