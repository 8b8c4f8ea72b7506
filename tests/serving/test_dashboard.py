# SPDX-License-Identifier: Apache-2.0
"""The dashboard is what Grafana and Prometheus take. `test_server.py` asks for its metrics."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from itertools import combinations
from typing import Any

import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from helpers.dashboard import RULES, dashboard, metrics_of, panels, queries, selectors
from prometheus_client import CollectorRegistry, Counter, Gauge

from vllm_adaskip.serving.counters import ServerCounters


def lost(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """Where something in one JSON value is not in the other."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key, value in before.items():
            yield from lost(value, after.get(key, "nothing"), f"{path}.{key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, pair in enumerate(zip(before, after, strict=True)):
            yield from lost(*pair, f"{path}[{index}]")
    elif before != after:
        yield f"{path}: {before!r} became {after!r}"


def test_grafanas_own_schema_knows_every_field() -> None:
    """Its SDK drops what it does not know, down to the options of each kind of panel."""
    register_default_plugins()
    read = Dashboard.from_json(dashboard())
    assert list(lost(dashboard(), json.loads(json.dumps(read, cls=JSONEncoder)))) == []


def test_an_import_finds_what_it_needs() -> None:
    board = dashboard()
    assert board["uid"] and board["title"] and board["schemaVersion"] >= 36
    assert "id" not in board  # it would be another dashboard's
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in panels():
        assert panel["title"] and panel["description"] and panel["targets"]
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)


def test_panels_do_not_overlap() -> None:
    places = [panel["gridPos"] for panel in dashboard()["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above


def test_every_variable_that_is_used_is_defined() -> None:
    defined = {variable["name"] for variable in dashboard()["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard())))
    assert used - {"__rate_interval", "__all"} == defined


def test_prometheus_understands_every_query_and_each_asks_for_the_chosen_model() -> None:
    assert len(queries()) >= len(panels())
    assert len(selectors()) >= len(queries())
    for selector in selectors():
        labels = {matcher.name: matcher.value for matcher in selector.matchers.matchers}
        assert labels.get("model_name") == "$model_name", selector.name
        assert "refused" in selector.name or labels.get("engine") == "$engine", selector.name


def ours() -> set[str]:
    registry = CollectorRegistry()
    ServerCounters(*(partial(kind, registry=registry) for kind in (Counter, Gauge)), "m")
    return {
        f"{family.name}_total" if family.type == "counter" else family.name
        for family in registry.collect()
    }


def test_every_counter_of_ours_is_shown() -> None:
    assert ours() == {one.name for one in selectors() if one.name.startswith("vllm:adaskip")}


def test_prometheus_understands_every_rule_and_all_its_metrics_exist() -> None:
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    for rule in group["rules"]:
        assert rule["alert"] and rule["annotations"]["summary"] and rule["labels"]["severity"]
        assert {one.name for one in metrics_of(rule["expr"])} <= ours()
