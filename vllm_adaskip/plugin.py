# SPDX-License-Identifier: Apache-2.0
"""Entry point ``vllm.general_plugins``: vLLM calls `register` in every process.

Registering changes nothing for engines that do not ask for us: it names our
architectures, a config hook for these alone, and one argument of the parser. An engine that
brings our options and does not ask for us is refused.
"""

from __future__ import annotations

from argparse import ArgumentError, Namespace
from logging import getLogger
from typing import Any

NAME = "adaskip"
#: Where `--plugin` stands among what was parsed: not as ``plugin``, which may be somebody else's.
_PARSED = "adaskip_plugin"
_REPORT = "vllm_adaskip.serving.report_endpoint.ReportMiddleware"


def register() -> None:
    """Name our architectures, their config hook and ``--plugin``; safe to call again.

    An error in here would stop every vLLM process on the machine, also those that do not
    ask for us. So it is logged, and an engine that asks finds no ``--plugin`` and no architecture.
    """
    try:
        _register()
    except Exception:
        getLogger("vllm").exception("vllm-adaskip could not register and is off; adaskip doctor")


def _register() -> None:
    from vllm import ModelRegistry

    from vllm_adaskip.engine.compat import check_engines, extend_parser, register_config_hook
    from vllm_adaskip.model_executors.registry import FAMILIES
    from vllm_adaskip.startup import check_class, prepare

    for family in FAMILIES.values():
        ModelRegistry.register_model(family.architecture, family.target)
        register_config_hook(family.architecture, prepare)
    check_engines(check_class)
    extend_parser(_add_arguments, _finish)


def _add_arguments(parser: Any) -> None:
    group = parser.add_argument_group("vllm-adaskip")  # which is not shown while it is empty
    try:
        group.add_argument(
            "--plugin",
            dest=_PARSED,
            choices=[NAME],
            default=None,
            help="Serve with vllm-adaskip. Its options: "
            '--additional-config \'{"adaskip": {"method": "static", "skip": [5, 6]}}\'.',
        )
    except ArgumentError as error:
        raise ValueError(
            f"{error}. The option is somebody else's here; turn vllm-adaskip on by its options, "
            "as in --additional-config '{\"adaskip\": {}}', or by naming its architecture in "
            "--hf-overrides"
        ) from None
    group.description = "Layer skipping per sequence."


def _finish(args: Namespace) -> None:
    """Turn the plugin on where it was asked for, by name or by bringing its options."""
    from vllm_adaskip.config import AdaSkipConfig, asks
    from vllm_adaskip.launch import UseAdaSkip, speculative_config

    additional = getattr(args, "additional_config", None) or {}
    if not asks(additional) and getattr(args, _PARSED, None) != NAME:
        return
    if getattr(args, "config", None):  # vLLM takes it away where it reads the file
        raise ValueError(f"--config={args.config} is not read; write --config {args.config}")
    drafting = speculative_config(AdaSkipConfig.of(additional))
    args.additional_config = {NAME: {}, **additional}
    if drafting is not None:
        if theirs := getattr(args, "speculative_config", None):
            raise ValueError(f"adaskip.draft and --speculative-config {theirs}: leave one out")
        args.speculative_config = drafting
    if not isinstance(args.hf_overrides, UseAdaSkip):
        args.hf_overrides = UseAdaSkip(args.hf_overrides or None)
    _add_report(args)


def _add_report(args: Namespace) -> None:
    """Have this server answer ``GET /adaskip/report``, if it is one and not a batch.

    By vLLM's own option ``--middleware``, which is of one server. Its endpoint plugins are loaded
    only where VLLM_PLUGINS names them, and that decides on every plugin of whatever process it
    comes to.
    """
    theirs = getattr(args, "middleware", None)
    if theirs is not None and _REPORT not in theirs:
        args.middleware = [*theirs, _REPORT]
