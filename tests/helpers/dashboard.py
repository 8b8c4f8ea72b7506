# SPDX-License-Identifier: Apache-2.0
"""The Grafana dashboard's queries, read as Prometheus would."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import promql_parser

from helpers.readme import ROOT

PATH = ROOT / "deploy" / "grafana" / "adaskip.json"
RULES = ROOT / "deploy" / "grafana" / "alerts.yaml"


def dashboard() -> dict[str, Any]:
    board: dict[str, Any] = json.loads(PATH.read_text())
    return board


def panels() -> list[dict[str, Any]]:
    """Those that show something, without the rows between them."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def queries() -> list[str]:
    """All PromQL, with Grafana's own interval filled in; other variables stand in strings."""
    return [
        target["expr"].replace("$__rate_interval", "5m")
        for panel in panels()
        for target in panel["targets"]
    ]


def selectors() -> list[promql_parser.VectorSelector]:
    """Every metric that a query names, with its labels."""
    return [found for query in queries() for found in metrics_of(query)]


def metrics_of(query: str) -> list[promql_parser.VectorSelector]:
    """Every metric that one query names."""
    return [*_selectors(promql_parser.parse(query))]


def _selectors(node: Any) -> Iterator[promql_parser.VectorSelector]:
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    for name in ("lhs", "rhs", "expr", "vector_selector", "args"):
        inner = getattr(node, name, None) or []
        for one in inner if isinstance(inner, list) else [inner]:
            yield from _selectors(one)
