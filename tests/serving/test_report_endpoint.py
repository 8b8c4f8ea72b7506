# SPDX-License-Identifier: Apache-2.0
"""The endpoint in a server that did not ask for us."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY, generate_latest

from vllm_adaskip.serving.report_endpoint import ReportEndpoint


@pytest.mark.parametrize("additional", [None, {}, {"somebody_elses": {}}])
def test_a_server_without_us_counts_nothing_and_is_asked_nothing(additional: Any) -> None:
    state: Any = SimpleNamespace()
    client: Any = object()  # of which nothing may be wanted
    args = Namespace(additional_config=additional)
    asyncio.run(ReportEndpoint().init_state(client, state, args))
    assert state.adaskip_engine is None and not hasattr(state, "adaskip_metrics")
    assert b"adaskip" not in generate_latest(REGISTRY)
