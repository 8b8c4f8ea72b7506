# SPDX-License-Identifier: Apache-2.0
"""What ``collective_rpc`` reaches in a worker."""

from __future__ import annotations

from typing import Any


class AdaSkipWorkerExtension:
    """Mixed into vLLM's worker class by its ``worker_extension_cls`` option."""

    def adaskip_report(self) -> dict[str, Any]:
        """Give this worker's cumulative counters, see `SkipRuntime.report`."""
        report: dict[str, Any] = self.get_model().adaskip.report()  # type: ignore[attr-defined]
        return report
