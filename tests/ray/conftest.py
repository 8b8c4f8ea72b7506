# SPDX-License-Identifier: Apache-2.0
"""One app for all tests that need two replicas, which take minutes to start."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import psutil


@pytest.fixture(scope="session")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[psutil.Process]:
    """Start Ray and deploy the app, with plan affinity; without it `test_serve_run.py` does."""
    from helpers.ray_app import deployed

    with deployed(tmp_path_factory.mktemp("serve"), affinity=True) as process:
        yield process


@pytest.fixture
def cluster(app: psutil.Process) -> psutil.Process:
    """Return Ray's process, once both replicas are up, whatever the test before did to them."""
    from helpers.ray_app import wait_for_both

    wait_for_both()
    return app
