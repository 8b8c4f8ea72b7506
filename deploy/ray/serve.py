# SPDX-License-Identifier: Apache-2.0
"""An OpenAI-compatible app on Ray Serve: ``serve run deploy/ray/serve.yaml``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from logging import getLogger
from typing import Any

import ray
from ray import serve
from ray.serve.deployment import Application
from ray.serve.llm import LLMConfig, build_openai_app
from ray.serve.llm.deployment import LLMServer

from deploy.ray.app_args import AppArgs
from vllm_adaskip.plugin import register
from vllm_adaskip.serving.metrics import start_metrics

# A replica imports this module, and looks at the engine's config, before vLLM loads plugins there.
register()

#: Kinds of arguments that a replica tells apart; clients choose them, so there must be an end.
KINDS = 100


class AdaSkipServer(LLMServer):
    """A replica. What it has beside Ray's own are our counters."""

    async def __init__(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[misc]
        # Ray awaits it, as it does its own.
        self._asked: Counter[str] = Counter()
        await super().__init__(*args, **kwargs)

    async def start(self) -> None:
        """Start the engine, and the counters that Ray's metrics pages show (docs/monitoring.md)."""
        await super().start()
        self._counters = start_metrics(self.engine._engine_client)

    async def adaskip_report(self) -> dict[str, Any]:
        """Return ``replica``, its name, ``asked`` and ``workers``.

        ``asked`` counts requests by their arguments that begin with ``adaskip``, as JSON, also
        those that were refused; ``workers`` holds ``adaskip_report`` of each worker.
        """
        return {
            "replica": serve.get_replica_context().replica_id.unique_id,
            "asked": dict(self._asked),
            "workers": await self.collective_rpc("adaskip_report"),
        }

    async def chat(self, request: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        """Count the request, and answer as Ray's own replica does."""
        self._count(request)
        answer: AsyncGenerator[Any, None] = await super().chat(request, *args, **kwargs)
        return answer

    async def completions(
        self, request: Any, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        """Count the request, and answer as Ray's own replica does."""
        self._count(request)
        answer: AsyncGenerator[Any, None] = await super().completions(request, *args, **kwargs)
        return answer

    def _count(self, request: Any) -> None:
        xargs = request.vllm_xargs or {}
        ours = {key: value for key, value in sorted(xargs.items()) if key.startswith("adaskip")}
        kind = json.dumps(ours)[:200]
        if kind not in self._asked and len(self._asked) >= KINDS:
            kind = "others"
        self._asked[kind] += 1


def app(args: Mapping[str, Any]) -> Application:
    """Build the app that the ``args`` of a Serve config file describe, see `AppArgs`.

    Raises:
        ValueError: an argument that does not exist or is not allowed.

    """
    settings = AppArgs.model_validate(dict(args))
    _say_what_is_missing(settings)
    return application(settings.llm_config())


def application(config: LLMConfig) -> Application:
    """Build the app of our replicas, with Ray's OpenAI endpoint before them."""
    config.server_cls = AdaSkipServer
    # The ingress only passes requests on, too.
    ingress = {"ray_actor_options": {"num_cpus": 0}}
    return build_openai_app({"llm_configs": [config], "ingress_deployment_config": ingress})


def _say_what_is_missing(settings: AppArgs) -> None:
    """Warn where the cluster has no GPU now: replicas wait for one, and say nothing of it."""
    if settings.accelerator != "gpu" or not ray.is_initialized():
        return
    if not ray.cluster_resources().get("GPU"):
        getLogger("ray.serve").warning(
            "vllm-adaskip: each replica needs %d GPU; this cluster has none now, so replicas "
            "wait until a node with one joins",
            settings.tensor_parallel_size,
        )
