# SPDX-License-Identifier: Apache-2.0
"""What a fit was started with, so that a killed one goes on, and with nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_adaskip.lab.digest import of_data
from vllm_adaskip.lab.fitting.samples import Sample

FILE = "fit.json"


class ResumeError(ValueError):
    """A folder with another fit; the message says in what they differ."""


def start_or_resume(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write what a new fit is told, or check that an earlier one in the folder was told the same.

    Raises:
        ResumeError: it was not, or the folder cannot be read.

    """
    path = folder / FILE
    text = json.dumps(facts, indent=1) + "\n"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return
    try:
        earlier = json.loads(path.read_text())
    except ValueError as error:
        raise ResumeError(f"{path}: {error}; use another --out") from None
    if not isinstance(earlier, dict):
        raise ResumeError(f"{path}: is not what a fit writes; use another --out")
    for key, new in json.loads(text).items():
        if (old := earlier.get(key)) != new:
            raise ResumeError(
                f"{folder} holds another fit: its {key} is {old!r:.120}, not {new!r:.120}; "
                "use another --out, or the same arguments"
            )


def digest(samples: Sequence[Sample]) -> str:
    """Return what tells these examples, tokens and order, from others."""
    return of_data([[one.ids, one.answer] for one in samples])
