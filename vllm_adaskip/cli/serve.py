# SPDX-License-Identifier: Apache-2.0
"""``adaskip serve``: ``vllm serve`` with the plugin on, bound to this machine."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Path or hub name of the model.")] = "",
) -> None:
    """Serve MODEL (default: the bundled one); all further options are `vllm serve`'s own.

    Binds to 127.0.0.1 unless --host says otherwise.
    """
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main"]
    os.execv(sys.executable, [*command, *serve_arguments(model, context.args)])


def serve_arguments(model: str, extra: list[str]) -> list[str]:
    """Give the arguments of the `vllm` command."""
    from vllm_adaskip.bundled import bundled_model

    if model.startswith("-"):  # the model was left out and the first option took its place
        model, extra = "", [model, *extra]
    has_host = any(argument.split("=")[0] == "--host" for argument in extra)
    host = [] if has_host else ["--host", "127.0.0.1"]
    return ["serve", model or bundled_model(), "--plugin", "adaskip", *host, *extra]
