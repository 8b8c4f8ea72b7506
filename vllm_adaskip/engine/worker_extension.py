# SPDX-License-Identifier: Apache-2.0
"""What ``collective_rpc`` reaches in a worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Entries = list[int | str]


class AdaSkipWorkerExtension:
    """Mixed into vLLM's worker class by its ``worker_extension_cls`` option."""

    def adaskip_report(self) -> dict[str, Any]:
        """Give this worker's cumulative counters, see `SkipRuntime.report`."""
        report: dict[str, Any] = self.get_model().adaskip.report()  # type: ignore[attr-defined]
        return report

    def adaskip_plans(
        self, requests: Sequence[tuple[Mapping[str, Any] | None, Sequence[int]]]
    ) -> list[Entries | None]:
        """Give the plan of each ``(extra_args, prompt_token_ids)``, also a decided one.

        None where a method reads the prompt and has not done so, or not of late, and where
        it decides token by token: then there is no one plan, and only `adaskip_report` says
        what ran.
        """
        runtime = self.get_model().adaskip  # type: ignore[attr-defined]
        return [runtime.plan_of(extra_args, prompt) for extra_args, prompt in requests]
