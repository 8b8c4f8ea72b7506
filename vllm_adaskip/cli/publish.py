# SPDX-License-Identifier: Apache-2.0
"""``adaskip publish``: put a profile on the hub, from where a server takes it by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_adaskip.cli.run import console, plain_errors


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
