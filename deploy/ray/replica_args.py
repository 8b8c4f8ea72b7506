# SPDX-License-Identifier: Apache-2.0
"""What one replica is made from, on Ray Serve and on Ray Data alike."""

from __future__ import annotations

import difflib
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_adaskip.bundled import bundled_model
from vllm_adaskip.config import AdaSkipConfig
from vllm_adaskip.launch import engine_args

#: Engine options that have an argument of their own here.
_OWN = {"max_model_len": "max_model_len", "model": "model", "served_model_name": "name"}
_OWN |= {"tensor_parallel_size": "tensor_parallel_size"}


class ReplicaArgs(BaseModel):
    """Frozen and validated; an unknown argument is an error that names the nearest.

    Attributes:
        model: folder or hub id; the bundled model by default.
        adaskip: our options, as under ``adaskip`` in ``--additional-config``.
        accelerator: ``cpu`` or ``gpu``; for ``gpu`` see docs/gpu.md.
        accelerator_type: kind of GPU as Ray names it, such as ``L4``.
        cpus: CPU cores, and threads, of a replica on the CPU.
        kv_cache_gib: memory of a replica's KV cache on the CPU, GiB.
        tensor_parallel_size: GPUs a replica is spread over.
        placement: Ray's ``placement_group_config``: ``bundle_per_worker`` or ``bundles``, and
            ``strategy``.
        max_model_len: longest sequence, tokens.
        engine_kwargs: vLLM's other engine options, such as ``{"enforce_eager": true}``.
        env_vars: environment variables of replicas and their workers.

    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: str = Field(default_factory=bundled_model)
    adaskip: dict[str, Any] = {}
    accelerator: Literal["cpu", "gpu"] = "cpu"
    accelerator_type: str | None = None
    cpus: int = Field(default=1, ge=1)
    kv_cache_gib: int = Field(default=4, ge=1)
    tensor_parallel_size: int = Field(default=1, ge=1)
    placement: dict[str, Any] | None = None
    max_model_len: int | None = Field(default=None, ge=1)
    engine_kwargs: dict[str, Any] = {}
    env_vars: dict[str, str] = {}

    @model_validator(mode="before")
    @classmethod
    def _known(cls, args: Any) -> Any:
        """Name the nearest argument to one that does not exist."""
        for key in args if isinstance(args, dict) else ():
            if key not in cls.model_fields:
                near = difflib.get_close_matches(str(key), cls.model_fields, n=1, cutoff=0.0)
                raise ValueError(
                    f"{key}: unknown argument (did you mean {near[0]}?); "
                    f"allowed: {', '.join(cls.model_fields)}"
                )
        return args

    @model_validator(mode="after")
    def _fit_together(self) -> ReplicaArgs:
        for key in sorted(_OWN.keys() & self.engine_kwargs.keys()):
            raise ValueError(f"engine_kwargs: {key} is not allowed there; set {_OWN[key]} instead")
        config = AdaSkipConfig.parse(self.adaskip)
        if self.accelerator == "cpu":
            self._check_cpu()
        else:
            self._check_gpu(config)
        return self

    def _check_cpu(self) -> None:
        if self.tensor_parallel_size > 1:
            raise ValueError(
                f"tensor_parallel_size: {self.tensor_parallel_size} needs accelerator gpu; on the "
                "CPU spread the load over replicas"
            )
        if self.accelerator_type is not None:
            raise ValueError(f"accelerator_type: {self.accelerator_type!r} needs accelerator gpu")

    def _check_gpu(self, config: AdaSkipConfig) -> None:
        """Refuse here what an engine on a GPU would refuse once its replica runs."""
        if not config.untested_accelerator:
            raise ValueError(
                "accelerator: 'gpu' has not been run yet; use cpu, or set adaskip to "
                '{"untested_accelerator": true} and see docs/gpu.md'
            )
        if self.engine_kwargs.get("enforce_eager") is not True:
            raise ValueError(
                "engine_kwargs: on a GPU skip plans run eagerly only; set enforce_eager to true"
            )

    @property
    def engine(self) -> dict[str, Any]:
        """All engine options but the model, with those that turn the plugin on."""
        theirs = dict(self.engine_kwargs)
        ours = engine_args(
            hf_overrides=theirs.pop("hf_overrides", None),
            additional_config=theirs.pop("additional_config", None),
            **self.adaskip,
        )
        if self.max_model_len is not None:
            theirs["max_model_len"] = self.max_model_len
        return {**theirs, **ours, "tensor_parallel_size": self.tensor_parallel_size}

    @property
    def placement_group(self) -> dict[str, Any] | None:
        """Where a replica's workers go; None leaves it to Ray, a GPU each."""
        if self.placement is None and self.accelerator == "cpu":
            return {"bundle_per_worker": {"CPU": self.cpus}}
        return self.placement

    @property
    def runtime_env(self) -> dict[str, Any]:
        """Ray's ``runtime_env`` of a replica."""
        if self.accelerator == "gpu":
            return {"env_vars": {"VLLM_USE_V2_MODEL_RUNNER": "1", **self.env_vars}}
        defaults = {
            "VLLM_CPU_KVCACHE_SPACE": str(self.kv_cache_gib),
            "OMP_NUM_THREADS": str(self.cpus),
            # Each replica by itself would bind its threads to the machine's first cores.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        return {"env_vars": {**defaults, **self.env_vars}}
