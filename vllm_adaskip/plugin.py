# SPDX-License-Identifier: Apache-2.0
"""Entry point ``vllm.general_plugins``: vLLM calls `register` in every process.

Registering changes nothing for engines that do not ask for us: it names our
architectures, a config hook for these alone, and one argument of the parser. An engine that
brings our options and does not ask for us is refused.
"""

from __future__ import annotations

import os
from argparse import Namespace
from logging import getLogger
from typing import Any

NAME = "adaskip"


def register() -> None:
    """Name our architectures, their config hook and ``--plugin``; safe to call again.

    An error in here would stop every vLLM process on the machine, also those that do not
    ask for us. So it is logged, and who does ask finds no ``--plugin`` and no architecture.
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
    group = parser.add_argument_group("vllm-adaskip", "Layer skipping per sequence.")
    group.add_argument(
        "--plugin",
        choices=[NAME],
        default=None,
        help="Serve with vllm-adaskip. Its options: --additional-config "
        '\'{"adaskip": {"method": "static", "skip": [5, 6]}}\'.',
    )


def _finish(args: Namespace) -> None:
    """Turn the plugin on where it was asked for, by name or by bringing its options."""
    from vllm_adaskip.config import AdaSkipConfig, asks
    from vllm_adaskip.launch import UseAdaSkip, speculative_config

    additional = getattr(args, "additional_config", None) or {}
    if not asks(additional) and getattr(args, "plugin", None) != NAME:
        return
    if getattr(args, "config", None):  # vLLM takes it away where it reads the file
        raise ValueError(f"--config={args.config} is not read; write --config {args.config}")
    drafting = speculative_config(AdaSkipConfig.of(additional))
    args.additional_config = {NAME: {}, **additional}
    if drafting is not None:
        if theirs := getattr(args, "speculative_config", None):
            raise ValueError(f"adaskip.speculate and --speculative-config {theirs}: leave one out")
        args.speculative_config = drafting
    if not isinstance(args.hf_overrides, UseAdaSkip):
        args.hf_overrides = UseAdaSkip(args.hf_overrides or None)
    _allow_report_endpoint()


def _allow_report_endpoint() -> None:
    """Let vLLM load our endpoint, which it does only for plugins named in VLLM_PLUGINS.

    That variable is one allow-list for every kind of plugin, so the other installed
    plugins are named too; unless one of them brings an endpoint of its own, which is the
    user's to allow.
    """
    from importlib.metadata import entry_points

    if "VLLM_PLUGINS" in os.environ:
        return
    groups = ["general", "platform", "io_processor", "stat_logger", "endpoint"]
    found = {group: entry_points(group=f"vllm.{group}_plugins").names for group in groups}
    if found["endpoint"] - {NAME}:
        getLogger("vllm").warning(
            "GET /adaskip/report is off: other endpoint plugins are installed (%s). Name those "
            "you want, and adaskip, in VLLM_PLUGINS.",
            ", ".join(sorted(found["endpoint"] - {NAME})),
        )
        return
    os.environ["VLLM_PLUGINS"] = ",".join(sorted(set().union(*found.values())))
