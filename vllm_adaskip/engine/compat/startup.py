# SPDX-License-Identifier: Apache-2.0
"""While an engine starts: its config, the argument parser, the processor's features."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from logging import getLogger
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from argparse import Namespace

    from vllm.config import VllmConfig

logger = getLogger("vllm.adaskip")


def register_config_hook(architecture: str, prepare: Callable[[VllmConfig], None]) -> None:
    """Have ``prepare`` check and complete the config of every engine of one architecture.

    Since 0.26. Remove when `ModelRegistry.register_model` takes a config hook.
    """
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    class Hook(VerifyAndUpdateConfig):
        verify_and_update_config = staticmethod(prepare)

    MODELS_CONFIG_MAP[architecture] = Hook


def extend_parser(
    add_arguments: Callable[[Any], None], finish: Callable[[Namespace], None]
) -> None:
    """Add arguments to vLLM's engine parser, and a last look at what was parsed.

    Arguments are added just before the first parse, when vLLM and all other plugins have added
    theirs. If one of them has the same name, theirs stays, and the log says so once.
    ``finish`` runs when all arguments are known, so that their order does not matter; its
    ValueError becomes the parser's usage error.
    Safe to call twice. Since 0.26. Remove when plugins may add engine arguments.
    """
    from vllm.engine.arg_utils import EngineArgs

    build = EngineArgs.add_cli_args
    if getattr(build, "_adaskip", False):
        return

    def add_cli_args(parser: Any) -> Any:
        parser = build(parser)
        parse = parser.parse_known_args

        @cache
        def add_ours() -> None:
            try:
                add_arguments(parser)
            except Exception as error:
                _warn_once(f"vllm-adaskip leaves vLLM's arguments as they are: {error}")

        def parse_known_args(args: Any = None, namespace: Any = None) -> Any:
            add_ours()
            namespace, rest = parse(args, namespace)
            try:
                finish(namespace)
            except ValueError as error:
                parser.error(str(error))
            return namespace, rest

        parser.parse_known_args = parse_known_args
        return parser

    add_cli_args._adaskip = True  # type: ignore[attr-defined]
    EngineArgs.add_cli_args = staticmethod(add_cli_args)


@cache
def _warn_once(text: str) -> None:
    logger.warning(text)


def check_engines(check: Callable[[VllmConfig], None]) -> None:
    """Have ``check`` look at the config of every engine, whatever its architecture.

    It may refuse the engine (`ValueError`); no model is loaded yet.
    Safe to call twice. Since 0.26. Remove when plugins may check any engine's config.
    """
    from vllm.engine.arg_utils import EngineArgs

    create = EngineArgs.create_engine_config
    if getattr(create, "_adaskip", False):
        return

    @wraps(create)
    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
        vllm_config = create(self, *args, **kwargs)
        check(vllm_config)
        return vllm_config

    create_engine_config._adaskip = True  # type: ignore[attr-defined]
    EngineArgs.create_engine_config = create_engine_config


def is_probe(hf_config: Any) -> bool:
    """Return whether a config is made up by vLLM, to ask what an override does.

    Since 0.29. Remove when vLLM stops calling ``hf_overrides`` on a config of its own.
    """
    return str(getattr(hf_config, "model_type", "")).startswith("dummy_")


def enable_amx() -> None:
    """Ask the kernel for AMX in this process, where the CPU attention kernel will use it.

    Without it vLLM's bf16 attention dies with SIGILL. Since 0.26 (x86 with AMX only).
    Remove when vLLM's CPU worker does it.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()
