# SPDX-License-Identifier: Apache-2.0
"""What each replica of a running app has done: ``python -m deploy.ray.report``."""

from __future__ import annotations

import json
from typing import Any

import ray
from ray import serve


def reports(app: str = "adaskip") -> list[dict[str, Any]]:
    """Return `AdaSkipServer.adaskip_report` of every replica of an app on this Ray cluster.

    Raises:
        LookupError: no such app, or it is not one of ours.

    """
    applications = serve.status().applications
    deployments = applications[app].deployments if app in applications else {}
    ours = [name for name in deployments if name.startswith("AdaSkipServer:")]
    if not ours:
        raise LookupError(f"no app {app!r:.80} of ours; there are: {', '.join(applications)}")
    handle = serve.get_deployment_handle(ours[0], app)
    answers: list[dict[str, Any]] = handle.broadcast("adaskip_report").results(timeout_s=30)
    return sorted(answers, key=lambda answer: str(answer["replica"]))


if __name__ == "__main__":
    ray.init("auto", log_to_driver=False, logging_level="warning")
    for report in reports():
        print(json.dumps(report))
