# SPDX-License-Identifier: Apache-2.0
"""What an app on Ray Serve is made from: the ``args`` of deploy/ray/serve.yaml."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator
from ray.serve.config import RequestRouterConfig
from ray.serve.llm import LLMConfig

from deploy.ray.replica_args import ReplicaArgs


class AppArgs(ReplicaArgs):
    """A replica's arguments, and how many replicas there are.

    Attributes:
        name: what clients call the model.
        min_replicas: replicas that are always there.
        max_replicas: how many there may be under load.
        target_ongoing_requests: requests a replica should have at a time; above that Ray Serve
            adds replicas, below it takes them away.
        affinity: whether requests that skip alike go to the same replica, as far as its load
            allows; otherwise Ray Serve spreads them, whatever they skip.

    """

    name: str = "bundled"
    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=1, ge=1)
    target_ongoing_requests: int = Field(default=16, ge=1)
    affinity: bool = False

    @model_validator(mode="after")
    def _enough_replicas(self) -> AppArgs:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas: {self.max_replicas} is less than min_replicas, {self.min_replicas}"
            )
        return self

    def llm_config(self) -> LLMConfig:
        """Return what Ray Serve builds replicas from.

        Raises:
            ValueError: an engine option that vLLM does not have, or a placement that Ray
                does not understand.

        """
        config = LLMConfig(
            model_loading_config={"model_id": self.name, "model_source": self.model},
            accelerator_config={"kind": self.accelerator},
            accelerator_type=self.accelerator_type,
            placement_group_config=self.placement_group,
            engine_kwargs=self.engine,
            runtime_env=self.runtime_env,
            deployment_config={
                "autoscaling_config": {
                    "min_replicas": self.min_replicas,
                    "max_replicas": self.max_replicas,
                    "target_ongoing_requests": self.target_ongoing_requests,
                },
                # Three in a row that fail, and a replica is replaced: some six seconds after its
                # engine died. By Ray's default it would be half a minute, in which it goes on
                # taking requests.
                "health_check_period_s": 2,
                "health_check_timeout_s": 10,
                # The replica only passes requests on; what it costs are the engine's workers.
                "ray_actor_options": {"num_cpus": 0},
                **self._router,
            },
        )
        config.get_engine_config()  # reads the engine's options, and keeps what it read
        return config

    @property
    def _router(self) -> dict[str, Any]:
        if not self.affinity:
            return {}
        router = RequestRouterConfig(request_router_class="deploy.ray.router.AffinityRouter")
        return {"request_router_config": router}
