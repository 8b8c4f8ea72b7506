# SPDX-License-Identifier: Apache-2.0
"""What a worker's report comes to on ``/metrics``."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge

from vllm_adaskip.serving.counters import ServerCounters


def report(**more: Any) -> dict[str, Any]:
    """Of 3 layers: 10 generated tokens, 4 of which left out layer 1 and 2 the MLP of layer 2."""
    counted: dict[str, Any] = {
        "num_layers": 3,
        "prompt_tokens": 50,
        "shortened_tokens": 30,
        "decode_tokens": 10,
        "attn_run": [10, 6, 10],
        "mlp_run": [10, 6, 8],
        "requests": 7,
        "plans": {"dense": 3, "skipping": 2, "gated": 1},
        "method": "none",
        "live_rows": 0,
    }
    return {**counted, **more}


class Page:
    """Counters, and what Prometheus would read of them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        kinds = (partial(kind, registry=self.registry) for kind in (Counter, Gauge))
        self.counters = ServerCounters(*kinds, "m")

    def gauge(self, name: str, **labels: str) -> float | None:
        own = {"model_name": "m", "engine": "0", **labels}
        return self.registry.get_sample_value(f"vllm:adaskip_canary_{name}", own)

    def value(self, name: str, **labels: str) -> float | None:
        of_workers = {} if "reason" in labels else {"engine": "0"}
        return self.registry.get_sample_value(
            f"vllm:adaskip_{name}_total", {"model_name": "m", **of_workers, **labels}
        )


def test_rows_are_added_up_over_layers_by_kind() -> None:
    page = Page()
    page.counters.show_report(0, report())
    assert page.value("prompt_tokens") == 50 and page.value("decode_tokens") == 10
    assert page.value("shortened_prompt_tokens") == 30
    assert page.value("rows_run", kind="attention") == 26
    assert page.value("rows_run", kind="mlp") == 24
    assert page.value("rows_skipped", kind="attention") == 4
    assert page.value("rows_skipped", kind="mlp") == 6
    assert page.value("requests", plan="skipping") == 2
    assert page.value("requests", plan="gated") == 1
    assert page.value("exits") == 0
    assert page.value("guarded", verdict="slower") == 0
    judged = {"followed": 3, "slower": 2, "margin": 1}
    page.counters.show_report(0, report(guard={**judged, "factors": {}, "last": {}}))
    assert {each: page.value("guarded", verdict=each) for each in judged} == judged


def test_what_the_canary_read_is_shown_with_its_interval() -> None:
    page = Page()
    page.counters.show_report(0, report())
    assert page.gauge("off") == 0 and page.value("canary_answers") == 0
    assert page.gauge("agreement", part="mean") is None  # nothing was read
    read = {"off": True, "answers": 12, "dropped": 1, "agreement": [0.8, 0.7, 0.9]}
    page.counters.show_report(0, report(canary={**read, "surprise": [0.3]}))
    shown = [page.gauge("agreement", part=part) for part in ("mean", "low", "high")]
    assert (shown, page.gauge("off"), page.value("canary_answers")) == ([0.8, 0.7, 0.9], 1, 12)
    assert page.gauge("surprise", part="mean") == 0.3
    assert page.gauge("surprise", part="low") is None


def test_every_counter_has_its_zeros_before_anything_ran() -> None:
    """A rate needs the value before the first increment."""
    page = Page()
    nothing = report(decode_tokens=0, attn_run=[0] * 3, mlp_run=[0] * 3)
    page.counters.show_report(0, nothing)
    page.counters.show_refused({"adaskip": 0, "unknown": 0})
    assert page.value("rows_skipped", kind="mlp") == 0
    assert page.value("refused_requests", reason="unknown") == 0


def test_a_report_that_is_shown_twice_counts_once() -> None:
    page = Page()
    for tokens in (10, 10, 13):
        page.counters.show_report(0, report(decode_tokens=tokens, exits=[1, 2, 0]))
    assert page.value("decode_tokens") == 13
    assert page.value("exits") == 3


def test_a_worker_that_begins_anew_adds_to_what_was() -> None:
    page = Page()
    page.counters.show_report(0, report(prompt_tokens=50))
    page.counters.show_report(0, report(prompt_tokens=20))
    assert page.value("prompt_tokens") == 70


def test_engines_count_beside_each_other() -> None:
    page = Page()
    page.counters.show_report(0, report())
    page.counters.show_report(1, report(prompt_tokens=3))
    assert page.value("prompt_tokens") == 50
    assert page.value("prompt_tokens", engine="1") == 3


def test_refusals_by_reason() -> None:
    page = Page()
    page.counters.show_refused({"adaskip": 0, "adaskip_skip": 2})
    page.counters.show_refused({"adaskip": 1, "adaskip_skip": 5})
    assert page.value("refused_requests", reason="adaskip") == 1
    assert page.value("refused_requests", reason="adaskip_skip") == 5


def test_vllms_counters_for_ray_serve_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under Ray Serve nobody scrapes the replica; increments go to Ray."""
    metrics = pytest.importorskip("ray.util.metrics")
    from vllm.v1.metrics.ray_wrappers import RayCounterWrapper, RayGaugeWrapper

    handed_on: dict[tuple[str, ...], float] = {}

    def inc(self: Any, value: float, tags: dict[str, str]) -> None:
        key = (self.info["name"], *(tags[label] for label in tags if label != "ReplicaId"))
        handed_on[key] = handed_on.get(key, 0) + value

    def set_to(self: Any, value: float, tags: dict[str, str]) -> None:
        handed_on[self.info["name"], *(tags[label] for label in tags if label != "ReplicaId")] = (
            value
        )

    monkeypatch.setattr(metrics.Counter, "inc", inc)
    monkeypatch.setattr(metrics.Gauge, "set", set_to)
    counters = ServerCounters(RayCounterWrapper, RayGaugeWrapper, "m")
    for _ in range(2):
        counters.show_report(0, report())
        counters.show_refused({"unknown": 3})
    assert handed_on["vllm_adaskip_rows_skipped", "m", "0", "mlp"] == 6
    assert handed_on["vllm_adaskip_refused_requests", "m", "unknown"] == 3
    assert handed_on["vllm_adaskip_canary_off", "m", "0"] == 0
