# SPDX-License-Identifier: Apache-2.0
"""``adaskip serve`` and ``adaskip publish``: a server, and profiles where servers find them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from vllm_adaskip.cli.run import console, plain_errors


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


def publish(
    profile: Annotated[Path, typer.Argument(help="Folder of a profile.")],
    repo: Annotated[str, typer.Argument(help="Hub repository, org/name; made if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="If it is made.")] = False,
) -> None:
    """Put a profile on the Hugging Face hub, with a card; needs a token (`hf auth login`)."""
    with plain_errors():
        from vllm_adaskip.classifiers.hub import publish as put

        address = put(profile, repo, private=private)
    console.print(f"{profile} -> {address}; serve it with", style="bold")
    console.print(f"--additional-config.adaskip.profile {repo}", markup=False)
