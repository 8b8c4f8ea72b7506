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

from vllm_adaskip.engine.request import EngineFacts, Planner

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig

Named = TypeVar("Named")

_OURS = "vllm_adaskip.engine."
#: What an engine that drafts is asked for with; `startup.prepare` puts a named class in its place.
DRAFTER = f"{_OURS}drafter.SelfDraft"


def class_path(module: str, base: str, facts: EngineFacts) -> str:
    """Return the ``module:Class`` by which an engine with these facts names a class."""
    assert module.startswith(_OURS)
    return f"{module}:{base}_{facts.to_json().encode().hex()}"


def named_class(module: str, name: str, base: type[Named]) -> type[Named]:
    """Return the class that `class_path` named: a subclass of ``base`` with the ``planner``.

    The front end asks it about each request, see `validate_params`.

    Raises:
        AttributeError: the name is not such a name.

    """
    kind, _, facts = name.partition("_")
    if kind != base.__name__ or not facts:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    planner = _planner(facts)

    def validate_params(_: type, sampling_params: SamplingParams) -> None:
        """Refuse, in the front end, a request whose arguments are not allowed."""
        planner.admit(
            sampling_params.extra_args,
            asks_for_prompt_logprobs=sampling_params.prompt_logprobs is not None,
        )

    own = {"planner": planner, "validate_params": classmethod(validate_params)}
    return cast(type[Named], type(kind, (base,), own))


def planner_of(vllm_config: VllmConfig) -> Planner:
    """Return the planner of the class that an engine names."""
    if (speculative := vllm_config.speculative_config) is not None:  # ours, as `startup` checks
        return _planner(speculative.model.rpartition("_")[2])
    # Not `or ()`: under some releases the list calls itself empty, see `compat.admission`.
    named = vllm_config.model_config.logits_processors
    (path,) = [
        name
        for name in (() if named is None else named)
        if isinstance(name, str) and name.startswith(_OURS)
    ]
    return _planner(path.rpartition("_")[2])


@functools.lru_cache(maxsize=64)
def _planner(facts: str) -> Planner:
    return Planner(EngineFacts.from_json(bytes.fromhex(facts).decode()))
