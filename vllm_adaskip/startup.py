# SPDX-License-Identifier: Apache-2.0
"""What happens when an engine starts with one of our architectures.

vLLM calls `prepare` once per engine, for our architectures only. Set-ups in which plans
would be wrong or silently ignored are refused here, each with the option to change
(invariant 10).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from vllm_adaskip.config import AdaSkipConfig
from vllm_adaskip.engine.v1_feeder import class_path
from vllm_adaskip.model_executors.registry import family_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.adaskip")

_SCHEDULER = "vllm_adaskip.engine.compat.scheduler.MarkingScheduler"
_WORKER_EXTENSION = "vllm_adaskip.engine.worker_extension.AdaSkipWorkerExtension"
#: Of a model's config: what changes the attention of layers that else look like a family's.
_UNTRIED: dict[str, tuple[object, str]] = {
    "dual_chunk_attention_config": (None, "dual chunk attention"),
    "is_causal": (True, "bidirectional attention"),
    "qk_norm": (False, "a norm on queries and keys in a family that has none"),
}


def prepare(vllm_config: VllmConfig) -> None:
    """Check an engine's config and add what skipping needs: feeder and worker extension.

    Raises:
        ValueError: a set-up that is not supported, or options that do not fit the model.

    """
    if problems := list(_unsupported(vllm_config)):
        raise ValueError("\n- ".join(["vllm-adaskip cannot run with this set-up:", *problems]))
    model = vllm_config.model_config
    family = family_of(model.architecture)
    assert family is not None
    config = AdaSkipConfig.parse(vllm_config.additional_config.setdefault("adaskip", {}))
    config.check_model(model.hf_config.to_dict())
    feeder = class_path(config.facts(family.shape(model.hf_config)))
    model.logits_processors = [*(model.logits_processors or []), feeder]
    vllm_config.parallel_config.worker_extension_cls = _WORKER_EXTENSION
    if vllm_config.cache_config.enable_prefix_caching:
        vllm_config.scheduler_config.scheduler_cls = _SCHEDULER
    options = "".join(f", {key} {_shown(value)}" for key, value in config.method_options.items())
    logger.info(
        "vllm-adaskip: %s, method %s%s, profile %s, budget %g, kv_fill %s",
        family.architecture,
        config.method,
        options,
        config.profile or "none",
        config.budget,
        config.kv_fill,
    )


def _shown(value: object) -> str:
    """Give an option as it stands in a log line; of a fit's tables only how long they are."""
    if isinstance(value, list) and len(str(value)) > 60:
        return f"({len(value)} entries)"
    return str(value)


def _unsupported(vllm_config: VllmConfig) -> Iterator[str]:
    """Say, for each set-up that we cannot serve, which option to change."""
    from vllm.platforms import current_platform

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if vllm_config.use_v2_model_runner or not current_platform.is_cpu():
        yield (
            "Model Runner V2 and accelerators are not supported yet; use the CPU backend and "
            "leave VLLM_USE_V2_MODEL_RUNNER unset or 0"
        )
    if (stages := parallel.pipeline_parallel_size) > 1:
        yield f"pipeline parallel is not supported; set --pipeline-parallel-size {stages} to 1"
    if vllm_config.speculative_config is not None:
        yield "speculative decoding is not supported; remove --speculative-config"
    if vllm_config.lora_config is not None:
        yield "LoRA adapters are not supported; remove --enable-lora, or merge the adapter"
    if model.quantization is not None:
        yield (
            f"quantisation {model.quantization!r} has not been tested; use an unquantised "
            "checkpoint and remove --quantization"
        )
    if vllm_config.kv_transfer_config is not None:
        yield "KV transfer would hand on blocks with holes; remove --kv-transfer-config"
    if model.runner_type != "generate":
        yield f"only text generation is supported; set --runner {model.runner_type} to generate"
    if model.enable_prompt_embeds:
        yield "prompt embeddings are not supported; remove --enable-prompt-embeds"
    if (window := model.get_sliding_window()) is not None:
        yield (
            "sliding-window attention is not supported; add --disable-sliding-window, which limits "
            f"sequences to the window of {window} tokens, within which it is full attention"
        )
    for key, (usual, what) in _UNTRIED.items():
        if (value := getattr(model.hf_text_config, key, usual)) not in (usual, None):
            yield f"{what} has not been tested ({key} is {value!r:.80}); use a model without it"
    scheduler = vllm_config.scheduler_config.scheduler_cls
    if scheduler and scheduler != _SCHEDULER and vllm_config.cache_config.enable_prefix_caching:
        yield (
            f"--scheduler-cls {scheduler!r} would share blocks under plans with everybody; remove "
            "it, or add --no-enable-prefix-caching"
        )
    extension = parallel.worker_extension_cls
    if extension and extension != _WORKER_EXTENSION:
        yield f"--worker-extension-cls {extension!r} takes the place of ours; remove it"
