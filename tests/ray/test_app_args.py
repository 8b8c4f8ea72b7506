# SPDX-License-Identifier: Apache-2.0
"""Arguments of an app: what is refused, and what is built for CPUs, GPUs and Kubernetes."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from helpers.readme import ROOT
from ray.serve.schema import ServeDeploySchema

from deploy.ray.app_args import AppArgs
from deploy.ray.batch_args import BatchArgs
from vllm_adaskip.bundled import bundled_model, bundled_profile
from vllm_adaskip.launch import UseAdaSkip

GPU: dict[str, Any] = {
    "accelerator": "gpu",
    "adaskip": {"untested_accelerator": True},
    "engine_kwargs": {"enforce_eager": True},
}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"min_replica": 2}, ["min_replica", "did you mean min_replicas", "max_model_len"]),
        ({"max_replicas": 0}, ["max_replicas", "0", "greater"]),
        ({"min_replicas": 3, "max_replicas": 2}, ["max_replicas: 2", "min_replicas, 3"]),
        ({"max_replicas": "2"}, ["max_replicas", "'2'", "integer"]),
        ({"afinity": True}, ["afinity", "did you mean affinity"]),
        ({"affinity": "on"}, ["affinity", "'on'", "boolean"]),
        ({"adaskip": {"method": "x"}}, ["adaskip.method", "'x'", "static"]),
        ({"adaskip": {"profile": "/nowhere"}}, ["adaskip.profile", "/nowhere"]),
        ({"tensor_parallel_size": 2}, ["tensor_parallel_size: 2", "gpu", "replicas"]),
        ({"accelerator": "tpu"}, ["accelerator", "'tpu'", "'cpu' or 'gpu'"]),
        ({"accelerator_type": "L4"}, ["accelerator_type", "'L4'", "gpu"]),
        ({"engine_kwargs": {"model": "m"}}, ["engine_kwargs", "model"]),
        ({"engine_kwargs": {"eager": True}}, ["eager"]),
        (
            {"engine_kwargs": {"additional_config": {"adaskip": {"method": "none"}}}},
            ["additional_config", "'adaskip'"],
        ),
        ({"accelerator": "gpu"}, ["untested_accelerator", "docs/gpu.md"]),
        ({**GPU, "engine_kwargs": {}}, ["enforce_eager"]),
        ({**GPU, "accelerator_type": "L5"}, ["L5"]),
        ({**GPU, "placement": {"bundles": [{"GPU": -1}]}}, ["GPU"]),
    ],
)
def test_what_is_wrong_is_refused_by_name(args: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as refused:
        AppArgs.model_validate(args).llm_config()
    for word in words:
        assert word in str(refused.value)


def test_a_profile_and_a_callers_own_overrides_reach_the_engine() -> None:
    profile = bundled_profile("first")
    args = AppArgs.model_validate(
        {
            "adaskip": {"profile": profile, "kv_fill": "copy"},
            "max_model_len": 128,
            "engine_kwargs": {"hf_overrides": {"rope_theta": 1.0}, "additional_config": {"x": 1}},
        }
    )
    engine = args.llm_config().get_engine_config().get_initialization_kwargs()
    assert engine["model"] == bundled_model() and engine["max_model_len"] == 128
    assert engine["hf_overrides"] == UseAdaSkip({"rope_theta": 1.0})
    ours = {"profile": profile, "kv_fill": "copy"}
    assert engine["additional_config"] == {"x": 1, "adaskip": ours}
    assert engine["distributed_executor_backend"] == "mp"


def test_a_cpu_replica_has_its_cores_memory_and_no_bound_threads() -> None:
    config = AppArgs(cpus=3, kv_cache_gib=2, env_vars={"A": "b"}).llm_config()
    assert config.get_engine_config().placement_bundles == [{"CPU": 3}]
    assert config.runtime_env == {
        "env_vars": {
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "OMP_NUM_THREADS": "3",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "A": "b",
        }
    }


def test_a_gpu_replica_is_built_here_too() -> None:
    """As far as there is no GPU: bundles for two, Ray's executor, our runner."""
    args = {**GPU, "accelerator_type": "L4", "tensor_parallel_size": 2}
    config = AppArgs.model_validate(args).llm_config()
    engine = config.get_engine_config()
    assert engine.placement_bundles == [{"GPU": 1, "accelerator_type:L4": 0.001}] * 2
    assert engine.placement_strategy == "PACK"
    kwargs = engine.get_initialization_kwargs()
    assert kwargs["distributed_executor_backend"] == "ray"
    assert kwargs["tensor_parallel_size"] == 2 and kwargs["enforce_eager"] is True
    assert config.runtime_env == {"env_vars": {"VLLM_USE_V2_MODEL_RUNNER": "1"}}
    spread = {"bundle_per_worker": {"GPU": 1, "CPU": 2}, "strategy": "SPREAD"}
    placed = AppArgs.model_validate({**GPU, "tensor_parallel_size": 3, "placement": spread})
    engine = placed.llm_config().get_engine_config()
    assert engine.placement_bundles == [{"GPU": 1, "CPU": 2}] * 3
    assert engine.placement_strategy == "SPREAD"


def test_serve_yaml_autoscales_on_loopback() -> None:
    config = ServeDeploySchema.model_validate(
        yaml.safe_load((ROOT / "deploy/ray/serve.yaml").read_text())
    )
    assert config.http_options.host == "127.0.0.1"
    (app,) = config.applications
    assert app.import_path == "deploy.ray.serve:app"
    scaling = AppArgs.model_validate(app.args).llm_config().deployment_config["autoscaling_config"]
    assert scaling == {"min_replicas": 2, "max_replicas": 3, "target_ongoing_requests": 16}


def test_plans_choose_replicas_only_where_that_is_asked_for() -> None:
    assert "request_router_config" not in AppArgs().llm_config().deployment_config
    config = AppArgs(affinity=True).llm_config().deployment_config["request_router_config"]
    assert config.request_router_class == "deploy.ray.router.AffinityRouter"
    assert config.get_request_router_class().__name__ == "AffinityRouter"


def test_what_kuberay_gets_is_a_serve_config_of_ours_for_the_pods_it_asks_for() -> None:
    service = yaml.safe_load((ROOT / "deploy/kubernetes/rayservice.yaml").read_text())
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (app,) = config.applications
    args = AppArgs.model_validate(app.args)
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (bundle,) = args.llm_config().get_engine_config().placement_bundles
    # A replica a pod, and as many pods as replicas.
    assert bundle == {"CPU": float(group["rayStartParams"]["num-cpus"])}
    assert (args.min_replicas, args.max_replicas) == (group["minReplicas"], group["maxReplicas"])
    assert service["spec"]["rayClusterConfig"]["rayVersion"] == __import__("ray").__version__


def test_batch_yaml_is_read() -> None:
    args = BatchArgs.model_validate(yaml.safe_load((ROOT / "deploy/ray/batch.yaml").read_text()))
    assert args.replicas == 1 and args.engine["max_num_seqs"] == 64
    with pytest.raises(ValueError, match="did you mean replicas"):
        BatchArgs.model_validate({"replica": 2})
