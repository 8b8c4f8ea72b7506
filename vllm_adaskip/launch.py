# SPDX-License-Identifier: Apache-2.0
"""How an engine asks for the plugin: an architecture of ours, and our options beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_adaskip.config import LEVEL, AdaSkipConfig, ConfigError, asks, check_allow_list
from vllm_adaskip.engine.compat import is_probe
from vllm_adaskip.engine.naming import DRAFTER
from vllm_adaskip.model_executors.registry import FAMILIES, family_of

Overrides = Mapping[str, Any] | Callable[[Any], Any]


@dataclass(frozen=True)
class UseAdaSkip:
    """An ``hf_overrides`` callable that swaps in our architecture, after the user's overrides.

    A dataclass and not a closure, because vLLM sends it to other processes.
    """

    user: Overrides | None = None

    def __call__(self, hf_config: Any) -> Any:
        """Return the config with our architecture, or refuse the model (`ValueError`)."""
        if callable(self.user):
            hf_config = self.user(hf_config)
        elif self.user:
            _update(hf_config, self.user)
        if is_probe(hf_config):
            return hf_config
        check_allow_list()
        architectures = getattr(hf_config, "architectures", None) or []
        if (family := family_of(*architectures)) is None:
            raise ValueError(
                f"vllm-adaskip cannot skip in architecture {' or '.join(architectures) or '?'}; "
                f"supported: {', '.join(FAMILIES)}. Serve it without --plugin adaskip, or add "
                "it: docs/add-a-model.md in our repository says how."
            )
        hf_config.architectures = [family.architecture]
        return hf_config


def _update(hf_config: Any, overrides: Mapping[str, Any]) -> None:
    """Apply a dict of overrides as vLLM does; a dict for a nested config goes into it."""
    for key, value in overrides.items():
        nested = getattr(hf_config, key, None)
        if isinstance(value, Mapping) and hasattr(nested, "to_dict"):
            _update(nested, value)
        else:
            setattr(hf_config, key, value)


def engine_args(
    *,
    hf_overrides: Overrides | None = None,
    additional_config: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Return the keyword arguments that turn the plugin on: ``LLM(model, **engine_args(...))``.

    Args:
        hf_overrides: your own ``hf_overrides`` for the engine, if any.
        additional_config: your own ``additional_config`` for the engine, if any.
        options: the server's options, such as ``method="static", skip=[5, 6]``.

    Raises:
        ConfigError: an unknown option, a value that is not allowed, or options of ours that
            stand in ``additional_config``.

    """
    theirs = dict(additional_config or {})
    if asks(theirs):
        raise ConfigError(
            f"additional_config: {LEVEL!r} is not allowed there; give its options to engine_args"
        )
    additional = {**theirs, LEVEL: options}
    drafting = speculative_config(AdaSkipConfig.of(additional))
    return {
        "hf_overrides": UseAdaSkip(hf_overrides),
        "additional_config": additional,
        **({} if drafting is None else {"speculative_config": drafting}),
    }


def speculative_config(config: AdaSkipConfig) -> dict[str, Any] | None:
    """Return vLLM's ``speculative_config`` of an engine with option ``draft``; else None."""
    if config.draft is None:
        return None
    return {
        "method": "custom_class",
        "model": DRAFTER,
        "num_speculative_tokens": config.draft.tokens,
    }
