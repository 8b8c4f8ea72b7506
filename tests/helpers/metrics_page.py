# SPDX-License-Identifier: Apache-2.0
"""A running server's ``/metrics``, as Prometheus reads it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from helpers.http_server import URL
from vllm_adaskip.serving.metrics import PERIOD

KINDS = (("attention", "attn_run"), ("mlp", "mlp_run"))


class MetricsPage:
    """One scrape."""

    def __init__(self) -> None:
        text = httpx.get(f"{URL}/metrics", timeout=5).text
        families = text_string_to_metric_families(text)
        self._samples = [sample for family in families for sample in family.samples]
        self.labels = {sample.name: set(sample.labels) for sample in self._samples}

    def total(self, name: str, **labels: str) -> int:
        """One of our counters, added up over the labels that are not named."""
        found = [
            sample.value
            for sample in self._samples
            if sample.name == f"vllm:adaskip_{name}_total"
            and labels.items() <= sample.labels.items()
        ]
        assert found, (name, labels)
        return int(sum(found))


def scrape_until(condition: Callable[[MetricsPage], bool]) -> MetricsPage:
    """Scrape until it holds; the workers are asked now and then, by a machine that may be slow."""
    end = time.monotonic() + 60 * PERIOD
    while not condition(page := MetricsPage()) and time.monotonic() < end:
        time.sleep(0.1)
    return page


def wait_for_page(reports: list[dict[str, Any]]) -> MetricsPage:
    """Scrape until the counters have come as far as the engines' reports, then check them."""
    totals = [report["decode_tokens"] for report in reports]

    def shows_all(page: MetricsPage) -> bool:
        engines = range(len(totals))
        return totals == [page.total("decode_tokens", engine=str(engine)) for engine in engines]

    page = scrape_until(shows_all)
    for engine, report in enumerate(reports):
        own = {"engine": str(engine), "model_name": "bundled"}
        tokens = report["decode_tokens"]
        assert page.total("decode_tokens", **own) == tokens
        assert page.total("prompt_tokens", **own) == report["prompt_tokens"]
        for kind, run in KINDS:
            assert page.total("rows_run", kind=kind, **own) == sum(report[run])
            skipped = tokens * report["num_layers"] - sum(report[run])
            assert page.total("rows_skipped", kind=kind, **own) == skipped
        for plan, entered in report["plans"].items():
            assert page.total("requests", plan=plan, **own) == entered
    return page
