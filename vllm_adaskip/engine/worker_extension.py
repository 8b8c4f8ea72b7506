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
        it decides token by token: then there is no one plan, see `adaskip_ran`.
        """
        runtime = self.get_model().adaskip  # type: ignore[attr-defined]
        return [runtime.plan_of(extra_args, prompt) for extra_args, prompt in requests]

    def adaskip_ran(
        self, requests: Sequence[tuple[Mapping[str, Any] | None, Sequence[int]]]
    ) -> list[dict[str, Any] | None]:
        """Give what really ran of each ``(extra_args, prompt_token_ids)`` of a token gate's.

        Each is ``{"tokens": n, "left_out": [2 * num_layers ints]}``: generated tokens that have
        run (the last one drawn never does), each counted once whatever was replayed, and how
        many of them left out each sub-layer, attention 0, MLP 0, attention 1, ..., by plan
        or by gate. Requests with the same prompt and arguments, and parallel samples, are
        counted together from the first on; a key of others in ``extra_args`` tells them apart.
        None for requests that no gate decides about, and those not seen, or not of late.
        """
        runtime = self.get_model().adaskip  # type: ignore[attr-defined]
        return [runtime.ran_of(extra_args, prompt) for extra_args, prompt in requests]
