# SPDX-License-Identifier: Apache-2.0
"""Classes whose names carry an engine's facts.

vLLM finds the classes of its ``logits_processors`` option by name, in every process, and its
front end asks them about each request without the engine's config. So a class must know the
model's depth and the server's options: they are written into its name, which its module's
``__getattr__`` reads back. Nothing is kept anywhere, so two engines cannot meet here.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, TypeVar, cast

from vllm_adaskip.engine.facts import EngineFacts
from vllm_adaskip.engine.planner import Planner

if TYPE_CHECKING:
    from vllm.config import VllmConfig

Named = TypeVar("Named")

_OURS = "vllm_adaskip.engine."


def class_path(module: str, base: str, facts: EngineFacts) -> str:
    """Give the ``module:Class`` by which an engine with these facts names a class."""
    assert module.startswith(_OURS)
    return f"{module}:{base}_{facts.to_json().encode().hex()}"


def named_class(name: str, base: type[Named]) -> type[Named]:
    """Give the subclass of ``base`` that has a name, with its ``planner``; else AttributeError."""
    kind, _, facts = name.partition("_")
    if kind != base.__name__ or not facts:
        raise AttributeError(f"module {base.__module__!r} has no attribute {name!r}")
    return cast(type[Named], type(kind, (base,), {"planner": _planner(facts)}))


def planner_of(vllm_config: VllmConfig) -> Planner:
    """Give the planner of the class that an engine names."""
    # Not `or ()`: under some releases the list calls itself empty, see `compat.admission`.
    named = vllm_config.model_config.logits_processors
    (path,) = [
        one
        for one in (() if named is None else named)
        if isinstance(one, str) and one.startswith(_OURS)
    ]
    return _planner(path.rpartition("_")[2])


@functools.lru_cache(maxsize=64)
def _planner(facts: str) -> Planner:
    return Planner(EngineFacts.from_json(bytes.fromhex(facts).decode()))
