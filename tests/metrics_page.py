# SPDX-License-Identifier: Apache-2.0
"""A running server's ``/metrics``, as Prometheus reads it."""

from __future__ import annotations

import time
from typing import Any

import httpx
from http_server import URL
from prometheus_client.parser import text_string_to_metric_families

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


def wait_for_page(reports: list[dict[str, Any]]) -> MetricsPage:
    """Scrape until the counters have come as far as the engines' reports, then check them."""
    for _ in range(100):
        page = MetricsPage()
        shown = [
            page.total("decode_tokens", engine=str(engine)) for engine, _ in enumerate(reports)
        ]
        if shown == [report["decode_tokens"] for report in reports]:
            break
        time.sleep(0.1)
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
