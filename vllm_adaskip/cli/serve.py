# SPDX-License-Identifier: Apache-2.0
"""``adaskip serve`` and ``adaskip publish``: a server, and profiles where servers find them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from vllm_adaskip.cli.run import console, plain_errors
from vllm_adaskip.config import check_allow_list
from vllm_adaskip.lab.models import model_path


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Path or hub id, or smollm2 (adaskip get).")] = "",
) -> None:
    """Serve MODEL (default: the bundled one); all further options are `vllm serve`'s own.

    Binds to 127.0.0.1 unless --host, or the file of --config, says otherwise.
    """
    with plain_errors():
        check_allow_list()
        arguments = serve_arguments([model, *context.args] if model else context.args)
    os.execv(sys.executable, [sys.executable, "-m", "vllm.entrypoints.cli.main", *arguments])


def serve_arguments(written: list[str]) -> list[str]:
    """Return the arguments of the `vllm` command: ours only where the user wrote none.

    As for vLLM, the model stands first, or under ``--model``, or in the file of ``--config``.
    """
    # vLLM takes no notice of a file that is named by --config=FILE.
    written = [part for each in written for part in _split(each, "--config")]
    named = {each.partition("=")[0] for each in written} | _named_in_file(written)
    model: list[str] = []
    if written and not written[0].startswith("-"):
        model, written = [model_path(written[0])], written[1:]
    elif "--model" in written[:-1]:
        place = written.index("--model") + 1
        written[place] = model_path(written[place])
    elif "--model" not in named:
        model = [model_path("")]
    host = [] if "--host" in named else ["--host", "127.0.0.1"]
    return ["serve", *model, "--plugin", "adaskip", *host, *written]


def _split(argument: str, option: str) -> list[str]:
    """Return ``--option=value`` as two arguments, and any other as it is."""
    return argument.split("=", 1) if argument.startswith(f"{option}=") else [argument]


def _named_in_file(written: list[str]) -> set[str]:
    """Return the options in the file of ``--config``; of one that is wrong vLLM says so."""
    if "--config" not in written[:-1]:
        return set()
    import yaml

    path = Path(written[written.index("--config") + 1])
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return set()
    return {f"--{key}" for key in found} if isinstance(found, dict) else set()


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
