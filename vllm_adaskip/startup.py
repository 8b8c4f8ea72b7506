# SPDX-License-Identifier: Apache-2.0
"""What happens when an engine starts with one of our architectures.

vLLM calls `prepare` once per engine, for our architectures only. Set-ups in which plans
would be wrong or silently ignored are refused here, each with the option to change.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

from vllm import envs
from vllm.config import CompilationMode
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_adaskip.classifiers import Classifier
from vllm_adaskip.classifiers.hub import located
from vllm_adaskip.classifiers.profile import ADAPTER
from vllm_adaskip.config import LEVEL, AdaSkipConfig, ConfigError, asks
from vllm_adaskip.engine import naming
from vllm_adaskip.engine.compat import name_feeder
from vllm_adaskip.engine.request import Planner
from vllm_adaskip.model_executors.registry import FAMILIES, family_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.adaskip")

_ENGINE = "vllm_adaskip.engine"
_SCHEDULER = f"{_ENGINE}.blocks.MarkingScheduler"
_ASYNC_SCHEDULER = f"{_ENGINE}.blocks.AsyncMarkingScheduler"
_DRAFTING_WORKER = f"{_ENGINE}.worker.DraftingWorker"
_WORKER_EXTENSION = f"{_ENGINE}.counts.AdaSkipWorkerExtension"
#: vLLM's names of quantisations that `tests/engine/test_quantised.py` runs.
QUANTISED = ("compressed-tensors", "auto_gptq", "awq")
#: Of those of accelerators, never run: their modules are vLLM's own, and their weights stay whole.
_ON_ACCELERATORS = ("fp8", "auto_awq")
#: Of a model's config: what changes the attention of layers that else look like a family's.
_UNTRIED: dict[str, tuple[object, str]] = {
    "decoder_sparse_step": (1, "experts in some layers alone"),
    "dual_chunk_attention_config": (None, "dual chunk attention"),
    "is_causal": (True, "bidirectional attention"),
    "use_bidirectional_attention": (False, "bidirectional attention"),
    "mlp_only_layers": ([], "experts in some layers alone"),
    "qk_norm": (False, "a norm on queries and keys in a family that has none"),
}


def check_class(vllm_config: VllmConfig) -> None:
    """Refuse an engine that brings our options but runs a stock class, which ignores them.

    Raises:
        ConfigError: such an engine, or options under a name that is nearly ours.

    """
    model = vllm_config.model_config
    if not asks(vllm_config.additional_config) or model is None:
        return
    family = family_of(model.architecture)
    if family is None or family.architecture != model.architecture:
        mend = f"remove them, or use a model of one of these: {', '.join(FAMILIES)}"
        if family:
            override = f'hf_overrides={{"architectures": ["{family.architecture}"]}}'
            mend = f"use LLM(model, **vllm_adaskip.engine_args(...)), or add {override}"
        raise ConfigError(
            f"additional_config has options under {LEVEL!r}, but this engine would run "
            f"{model.architecture} and ignore them; {mend}"
        )


def prepare(vllm_config: VllmConfig) -> None:
    """Check an engine's config and add what skipping needs: feeder and worker extension.

    Raises:
        ValueError: a set-up that is not supported, or options that do not fit the model.

    """
    config = AdaSkipConfig.of(vllm_config.additional_config)
    vllm_config.additional_config.setdefault(LEVEL, {})
    model = vllm_config.model_config
    family = family_of(model.architecture)
    assert family is not None
    facts = config.facts(family.shape(model.hf_config))
    problems = [*_unsupported(vllm_config, config), *_unmergeable(vllm_config, config)]
    if not current_platform.is_cpu():
        problems += unsupported_accelerator(vllm_config, config, Planner(facts).classifier)
    if problems:
        raise ValueError("\n- ".join(["vllm-adaskip cannot run with this set-up:", *problems]))
    config.check_model(model.hf_config.to_dict())
    name_feeder(
        vllm_config,
        feeder=naming.class_path(f"{_ENGINE}.v1", "V1Feeder", facts),
        check=naming.class_path(f"{_ENGINE}.v2", "RequestCheck", facts),
    )
    vllm_config.parallel_config.worker_extension_cls = _WORKER_EXTENSION
    if config.draft is not None:
        drafter = naming.class_path(f"{_ENGINE}.drafter", "SelfDraft", facts)
        vllm_config.speculative_config.model = drafter.replace(":", ".")
        vllm_config.parallel_config.worker_cls = _DRAFTING_WORKER
    if current_platform.is_cpu() and vllm_config.scheduler_config.async_scheduling:
        logger.warning(  # asked for: where nobody says anything it is None until later
            "vllm-adaskip: --async-scheduling is switched off, as everywhere on the CPU backend"
        )
    if not vllm_config.scheduler_config.scheduler_cls or _needs_scheduler(vllm_config, config):
        _name_scheduler(vllm_config)
    options = "".join(f", {key} {_shown(value)}" for key, value in config.method_options.items())
    logger.info(
        "vllm-adaskip: %s, method %s%s, profile %s, max_compute %g, kv_fill %s",
        family.architecture,
        config.method,
        options,
        config.profile or "none",
        config.max_compute,
        config.kv_fill,
    )
    if model.quantization in _ON_ACCELERATORS:
        logger.warning(
            "vllm-adaskip: quantisation %r has been run under no plans; compare some answers "
            "with those of the unquantised model",
            model.quantization,
        )
    if config.guard and not current_platform.is_cpu():
        logger.warning("vllm-adaskip: guard measures on CPUs alone; here every plan is followed")
    elif config.guard and vllm_config.lora_config is not None:
        logger.warning("vllm-adaskip: guard measures no adapters; here every plan is followed")
    if config.coalesce_regret:
        logger.info(
            "vllm-adaskip: coalesce_regret %g, so a plan depends on the sequences in the batch "
            "when it is decided; the same request may get another plan later (docs/coalesce.md)",
            config.coalesce_regret,
        )


def _shown(value: object) -> str:
    """Return an option as it stands in a log line; of a fit's tables only how long they are."""
    if isinstance(value, list) and len(str(value)) > 60:
        return f"({len(value)} entries)"
    return str(value)


def _needs_scheduler(vllm_config: VllmConfig, config: AdaSkipConfig) -> bool:
    """Return whether blocks must be marked or kept free, or workers told of adapters or load."""
    adapters = vllm_config.lora_config is not None
    shortens = config.prompt is not None and config.prompt.busy is not None
    by_load = shortens or config.busy is not None or config.canary is not None
    drafts = config.draft is not None
    return vllm_config.cache_config.enable_prefix_caching or adapters or by_load or drafts


def _name_scheduler(vllm_config: VllmConfig) -> None:
    """Name the scheduler that does so; asynchronous on accelerators, unless users say no."""
    scheduler = vllm_config.scheduler_config
    if current_platform.is_cpu() or scheduler.async_scheduling is False:
        scheduler.scheduler_cls, scheduler.async_scheduling = _SCHEDULER, False
    else:
        scheduler.scheduler_cls = _ASYNC_SCHEDULER


def _unsupported(vllm_config: VllmConfig, config: AdaSkipConfig) -> Iterator[str]:
    """Say, for each set-up that we cannot serve, which option to change."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    yield from _graphs_that_hide_the_step(vllm_config)
    if (stages := parallel.pipeline_parallel_size) > 1:
        yield f"pipeline parallel is not supported; set --pipeline-parallel-size {stages} to 1"
    if parallel.prefill_context_parallel_size * parallel.decode_context_parallel_size > 1:
        yield (
            "context parallel is not supported; set --prefill-context-parallel-size and "
            "--decode-context-parallel-size to 1"
        )
    if parallel.use_ubatching:
        yield "dual batch overlap is not supported; remove --enable-dbo and --ubatch-size"
    yield from _undraftable(vllm_config, config)
    if (adapters := vllm_config.lora_config) is not None:
        if not current_platform.is_cpu():
            yield "LoRA adapters with plans have been run on CPUs alone; remove --enable-lora"
        if getattr(model.hf_text_config, "num_experts", None):
            yield "LoRA adapters beside experts have not been run; remove --enable-lora"
        if adapters.fully_sharded_loras:
            yield "sharded LoRA has not been tested; remove --fully-sharded-loras"
    accepted = QUANTISED if current_platform.is_cpu() else (*QUANTISED, *_ON_ACCELERATORS)
    if model.quantization not in (None, *accepted):
        yield (
            f"quantisation {model.quantization!r} has not been tested; use an unquantised "
            f"checkpoint, or one of these: {', '.join(accepted)}"
        )
    if vllm_config.kv_transfer_config is not None:
        yield "KV transfer would hand on blocks with holes; remove --kv-transfer-config"
    if model.runner_type != "generate":
        yield f"only text generation is supported; set --runner {model.runner_type} to generate"
    if model.enable_prompt_embeds:
        yield "prompt embeddings are not supported; remove --enable-prompt-embeds"
    if not current_platform.is_cpu() and (window := model.get_sliding_window()) is not None:
        yield (
            "sliding windows have been run on CPUs alone; add --disable-sliding-window, which "
            f"limits sequences to the window of {window} tokens, within which it is full attention"
        )
    for key, (usual, what) in _UNTRIED.items():
        if (value := getattr(model.hf_text_config, key, usual)) not in (usual, None):
            yield f"{what} has not been tested ({key} is {value!r:.80}); use a model without it"
    scheduler, ours = vllm_config.scheduler_config.scheduler_cls, (_SCHEDULER, _ASYNC_SCHEDULER)
    if scheduler and scheduler not in ours and _needs_scheduler(vllm_config, config):
        yield (
            f"--scheduler-cls {scheduler!r} would share blocks under plans with everybody; remove "
            "it, or add --no-enable-prefix-caching (and none of --enable-lora, busy, canary, "
            "prompt.busy)"
        )
    extension = parallel.worker_extension_cls
    if extension and extension != _WORKER_EXTENSION:
        yield f"--worker-extension-cls {extension!r} takes the place of ours; remove it"


def _undraftable(vllm_config: VllmConfig, config: AdaSkipConfig) -> Iterator[str]:
    """Say what does not go with drafts, ours or those of others."""
    theirs = vllm_config.speculative_config
    if config.draft is None:
        if theirs is not None:
            yield (
                f"--speculative-config with method {theirs.method!r} is not supported; remove it, "
                "or draft with the model's own layers: adaskip.draft (docs/lossless.md)"
            )
        return
    if theirs is None or theirs.model != naming.DRAFTER:
        yield (
            "adaskip.draft sets --speculative-config by itself; start with --plugin adaskip "
            "or vllm_adaskip.engine_args(), and name no speculative method beside it"
        )
    if not find_spec("vllm.triton_utils.dispatcher"):
        yield "drafts need vLLM 0.32 or later; remove adaskip.draft"
    if not current_platform.is_cpu():
        yield "drafts have been made on CPUs alone; remove adaskip.draft"
    if vllm_config.use_v2_model_runner:
        yield "drafts need the V1 runner; set VLLM_USE_V2_MODEL_RUNNER to 0"
    if vllm_config.model_config.logits_processors:
        yield "vLLM allows no logits processors beside drafts; remove --logits-processors"
    if vllm_config.lora_config is not None:
        yield "drafts with LoRA adapters have not been run; remove --enable-lora"
    if config.draft.profile and (found := vllm_config.model_config.quantization):
        yield (
            f"a draft's layers are not quantised, and the model is ({found}); remove "
            "adaskip.draft.profile, or use the unquantised checkpoint"
        )
    worker = vllm_config.parallel_config.worker_cls
    if worker not in ("auto", _DRAFTING_WORKER):
        yield f"--worker-cls {worker!r} takes the place of ours; remove it"


def _unmergeable(vllm_config: VllmConfig, config: AdaSkipConfig) -> Iterator[str]:
    """Say where a profile's LoRA cannot be added, or would be below an adapter made without it."""
    if not config.profile or not (located(config.profile) / ADAPTER).exists():
        return
    has = f"profile {config.profile!r:.200} has a LoRA adapter"
    if quantisation := vllm_config.model_config.quantization:
        yield (
            f"{has}, which cannot be added to weights of quantisation {quantisation!r}; use the "
            "unquantised checkpoint, or a profile without"
        )
    if vllm_config.lora_config is not None:
        yield (
            f"{has}, and adapters of requests were made for weights without; remove --enable-lora, "
            "or use a profile without"
        )


def _graphs_that_hide_the_step(vllm_config: VllmConfig) -> Iterator[str]:
    """Say which set-ups would run whole steps without asking us, and so silently dense."""
    if envs.VLLM_USE_BREAKABLE_CUDAGRAPH:
        yield "breakable CUDA graphs would ignore plans; unset VLLM_USE_BREAKABLE_CUDAGRAPH"
    if vllm_config.compilation_config.mode == CompilationMode.STOCK_TORCH_COMPILE:
        yield "mode 1 of -cc compiles around plans; leave it out, or add --enforce-eager"


def _has_been_tried() -> bool:
    from vllm_adaskip.engine.compat.model_state import DefaultModelState

    return current_platform.is_cuda() and hasattr(DefaultModelState, "capture_inner_cudagraphs")


def unsupported_accelerator(
    vllm_config: VllmConfig, config: AdaSkipConfig, classifier: Classifier
) -> Iterator[str]:
    """Say the same of an engine that is not on the CPU."""
    if not (config.untested_accelerator or _has_been_tried()):
        yield (
            "skip plans have been run on NVIDIA GPUs with vLLM 0.32 alone; use one, or the CPU "
            "backend, or set adaskip.untested_accelerator in --additional-config to true and see "
            "docs/gpu.md"
        )
    if not vllm_config.use_v2_model_runner:
        yield "accelerators need Model Runner V2; set VLLM_USE_V2_MODEL_RUNNER to 1"
    if classifier.gate_scope:
        yield (
            f"method {config.method!r} with these options decides on the host, in the middle of a "
            "forward, who goes on; use the CPU backend, or options that decide once a sequence"
        )
