# SPDX-License-Identifier: Apache-2.0
"""The plain facts by which every process of an engine skips alike."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vllm_adaskip.classifiers import DecoderShape


@dataclass(frozen=True)
class EngineFacts:
    """The model's depth and the server's options, already checked; they travel as JSON.

    ``profile``, a folder or hub id, is where a method finds its tensors, in every process.
    ``crossover`` is what stands in a `Crossover`'s file: read once, so that all processes agree.
    """

    shape: DecoderShape
    method: str = "none"
    method_options: Mapping[str, Any] | None = None
    budget: float = 1.0
    kv_fill: str = "none"
    profile: str | None = None
    crossover: Mapping[str, Any] | None = None
    coalesce: float = 0.0

    def to_json(self) -> str:
        """Write the facts as JSON text."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> EngineFacts:
        """Read what `to_json` wrote."""
        facts = json.loads(text)
        return cls(**{**facts, "shape": DecoderShape(**facts["shape"])})
