# SPDX-License-Identifier: Apache-2.0
"""What each replica of a running app has done: ``python -m deploy.ray.report``."""

from __future__ import annotations

import json
import time
from typing import Any

import ray
from ray import serve
from ray.serve.exceptions import DeploymentUnavailableError

#: Seconds in which this process hears of replicas that are there.
TO_HEAR = 20


def reports(app: str = "adaskip") -> list[dict[str, Any]]:
    """Return `AdaSkipServer.adaskip_report` of every replica of an app on this Ray cluster.

    Raises:
        LookupError: no such app, or it is not one of ours.
        DeploymentUnavailableError: no replica is up.

    """
    applications = serve.status().applications
    deployments = applications[app].deployments if app in applications else {}
    ours = [name for name in deployments if name.startswith("AdaSkipServer:")]
    if not ours:
        raise LookupError(f"no app {app!r:.80} of ours; there are: {', '.join(applications)}")
    answers = _asked(serve.get_deployment_handle(ours[0], app))
    return sorted(answers, key=lambda answer: str(answer["replica"]))


def _asked(handle: Any) -> list[dict[str, Any]]:
    """Return what the replicas answer; a handle that is new may not have heard of any yet."""
    end = time.monotonic() + TO_HEAR
    while True:
        try:
            answers: list[dict[str, Any]] = handle.broadcast("adaskip_report").results(timeout_s=30)
            return answers
        except DeploymentUnavailableError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


if __name__ == "__main__":
    ray.init("auto", log_to_driver=False, logging_level="warning")
    for report in reports():
        print(json.dumps(report))
