# SPDX-License-Identifier: Apache-2.0
"""The server's options, as they stand under ``adaskip`` in vLLM's ``additional_config``."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vllm_adaskip import old_names
from vllm_adaskip.classifiers import METHODS, DecoderShape, method_of
from vllm_adaskip.classifiers.hub import located
from vllm_adaskip.classifiers.methods import is_path
from vllm_adaskip.classifiers.plan import shown
from vllm_adaskip.classifiers.profile import Profile, ProfileError
from vllm_adaskip.engine.busy import BusyPlans, Level, Load
from vllm_adaskip.engine.canary import CanaryOptions
from vllm_adaskip.engine.draft_weights import DraftProfile
from vllm_adaskip.engine.drafts import DraftOptions
from vllm_adaskip.engine.prompt_plan import PromptOptions
from vllm_adaskip.engine.request import EngineFacts, Planner

#: The key of ``additional_config`` under which our options stand.
LEVEL = "adaskip"


class ConfigError(ValueError):
    """An option that is not allowed; the message names it, its value and what is allowed."""


def asks(additional_config: object) -> bool:
    """Return whether an engine's ``additional_config`` has options of ours.

    Raises:
        ConfigError: they stand under a name that is nearly ``adaskip``, where nothing reads them.

    """
    if not isinstance(additional_config, Mapping):
        return False
    for key in additional_config:
        if key != LEVEL and _is_nearly_ours(str(key)):
            raise ConfigError(
                f"additional_config: nobody reads {shown(key)}; allowed: {LEVEL!r}, an object "
                "with our options"
            )
    return LEVEL in additional_config


def _is_nearly_ours(key: str) -> bool:
    letters = re.sub("[^a-z]", "", key[:80].lower())
    return LEVEL in letters or bool(difflib.get_close_matches(letters, [LEVEL], cutoff=0.8))


def check_allow_list() -> None:
    """Refuse a process in which vLLM may not load this plugin (`ConfigError`)."""
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and LEVEL not in allowed.split(","):
        raise ConfigError(
            f"VLLM_PLUGINS is {allowed!r:.200}, so vLLM does not load vllm-adaskip; add adaskip to "
            "it, or unset it"
        )


class AdaSkipConfig(BaseModel):
    """Frozen and validated; a method's own options stand beside the common ones.

    Attributes:
        method: who decides the plan of a request that names none: one of `METHODS`, or
            ``module:Class`` of your own (docs/write-a-method.md).
        max_compute: largest share of decoder compute a decided plan may keep, in (0, 1].
        kv_fill: what is written into the KV cache where a generated token leaves out an
            attention sub-layer (docs/kv-cache.md).
        profile: folder or hub id of what ``adaskip fit``, ``scan`` or ``tune`` wrote for this
            model: a method, its options and a budget. Options that are set beside it override it.
        coalesce_regret: how far (0 to 1) a plan may be degraded so that sequences in a batch can
            share it; 0: never (docs/coalesce.md).
        guard: run a sequence dense if its decided plan would be slower on this machine, as measured
            at start-up and while serving; a plan that a request names is always followed. On the
            CPU alone (docs/performance.md).
        known_plans: plans that requests will name, each in the form of ``adaskip_skip``. Steps in
            which all sequences follow one of them are compiled on a CPU, and get CUDA graphs on a
            GPU (docs/gpu.md), at start-up.
        prompt: what the tokens of prompts leave out, but for the last ones (docs/prompts.md).
        busy: follow plans only while the engine is busy, and leave out more as load grows
            (docs/load.md).
        canary: read a share of finished answers under plans again at full depth, and switch plans
            off where they are worse than a bound (docs/load.md).
        draft: draft tokens with a part of the layers, and verify them with the whole model, or
            under the request's plan; changes no answer (docs/lossless.md).
        untested_accelerator: serve on an accelerator on which nobody has run this yet; an
            NVIDIA GPU with vLLM 0.32 does not need it (docs/gpu.md).

    """

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    method: str = "none"
    max_compute: float = Field(default=1.0, gt=0, le=1)
    kv_fill: Literal["copy", "project", "none"] = "none"
    profile: str | None = None
    coalesce_regret: float = Field(default=0.0, ge=0, le=1)
    guard: bool = False
    known_plans: list[list[int | str]] = []
    prompt: PromptOptions | None = None
    busy: BusyPlans | None = None
    canary: CanaryOptions | None = None
    draft: DraftOptions | None = None
    untested_accelerator: bool = False

    @field_validator("method")
    @classmethod
    def _method_exists(cls, method: str) -> str:
        own = method_of(method).Options.model_fields
        theirs = cls.model_fields.keys() | old_names.NEW[old_names.SERVER].keys()
        if taken := sorted(theirs & own.keys()):
            raise ValueError(f"its option {', '.join(taken)} has the name of a server's; rename it")
        return method

    @classmethod
    def parse(cls, options: object) -> AdaSkipConfig:
        """Read the options.

        Raises:
            ConfigError: not a mapping, an unknown option, or a value that is not allowed.

        """
        if not isinstance(options, Mapping):
            raise ConfigError(f"adaskip: {options!r:.80} is not allowed; allowed: a JSON object")
        options = _with_profile(_by_new_names(options))
        try:
            config = cls.model_validate(dict(options))
            method_of(config.method).Options.model_validate(config.method_options)
        except ValidationError as error:
            raise ConfigError(_explain(error, options)) from None
        return config

    @classmethod
    def of(cls, additional_config: object) -> AdaSkipConfig:
        """Read the options of an engine that runs our class from its ``additional_config``.

        Raises:
            ConfigError: as `parse`; or options of ours stand beside ``adaskip``, not under it.

        """
        if not isinstance(additional_config, Mapping):
            raise ConfigError(f"additional_config: {shown(additional_config)} is no JSON object")
        asks(additional_config)
        methods = (method.Options.model_fields for method in METHODS.values())
        ours = {*cls.model_fields, *old_names.NEW[old_names.SERVER]}.union(*methods)
        if misplaced := sorted(ours & additional_config.keys()):
            raise ConfigError(
                f"additional_config: nobody reads {', '.join(misplaced)} there; options of ours "
                f'stand one level deeper: {{"{LEVEL}": {{"{misplaced[0]}": ...}}}}'
            )
        return cls.parse(additional_config.get(LEVEL, {}))

    @property
    def method_options(self) -> dict[str, Any]:
        """The method's own options."""
        return dict(self.model_extra or {})

    def check_model(self, hf_config: Mapping[str, Any]) -> None:
        """Refuse a profile that was made for another model (`ConfigError`)."""
        draft = None if self.draft is None else self.draft.profile
        kinds = ("profile", self.profile, Profile), ("draft.profile", draft, DraftProfile)
        for option, name, kind in kinds:
            if name is not None:
                try:
                    kind.load(located(name)).check_model(hf_config)
                except ProfileError as error:
                    raise ConfigError(f"adaskip.{option}: {error}") from None

    def facts(self, shape: DecoderShape) -> EngineFacts:
        """Bind the options to a model.

        Raises:
            ConfigError: they do not fit it (a layer that does not exist, a budget that
                the method cannot meet).

        """
        facts = EngineFacts(
            shape,
            method=self.method,
            method_options=self.method_options,
            max_compute=self.max_compute,
            kv_fill=self.kv_fill,
            profile=self.profile,
            coalesce_regret=self.coalesce_regret,
            guard=self.guard,
            known_plans=self.known_plans,
            prompt=None if self.prompt is None else self.prompt.model_dump(by_alias=True),
            draft=None if self.draft is None else self.draft.model_dump(),
            busy=None if self.busy is None else self.busy.model_dump(),
            canary=None if self.canary is None else self.canary.model_dump(),
        )
        try:
            Planner(facts)
        except ValueError as error:
            raise ConfigError(f"adaskip: {error}") from None
        return facts


def _by_new_names(options: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        found = old_names.renamed(options, old_names.SERVER)
    except ValueError as error:
        raise ConfigError(f"adaskip: {error}") from None
    if isinstance(method := found.get("method"), str):
        found["method"] = old_names.method(method)
    return found


def _with_profile(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Complete the options by those of the profile that they name, if any."""
    if (name := options.get("profile")) is None:
        return options
    if not isinstance(name, str):
        raise ConfigError(
            f"adaskip.profile: {name!r:.80} is not allowed; allowed: a folder or a hub id"
        )
    try:
        profile = Profile.load(located(name))
    except ProfileError as error:
        raise ConfigError(f"adaskip.profile: {error}") from None
    method = options.get("method", profile.method)
    if is_path(profile.method) and "method" not in options:
        raise ConfigError(
            f"adaskip.profile: {name!r:.200} is for method {profile.method!r:.200}, which is code; "
            "a profile cannot name code to load, so set adaskip.method to it if you trust it"
        )
    if method != profile.method:
        raise ConfigError(
            f"adaskip.method: {method!r:.80} does not go with profile {name!r:.200}, which is "
            f"for method {profile.method!r}; leave one out"
        )
    brought = {
        **_by_new_names(profile.options),
        "method": method,
        "max_compute": profile.max_compute,
        "guard": profile.guard,
        "prompt": profile.prompt or None,
    }
    return {**brought, **options}


def _explain(error: ValidationError, options: Mapping[str, Any]) -> str:
    """One line per wrong option."""
    lines = []
    for problem in error.errors(include_url=False):
        key = str(problem["loc"][0])
        if len(problem["loc"]) > 1 and key in _NESTED:
            lines.append(_nested(problem))
        elif problem["type"] == "extra_forbidden":
            lines.append(_unknown(key, str(options.get("method", "none"))))
        elif problem["type"] == "missing":
            lines.append(f"adaskip.{key} is missing; method {options.get('method')!r} needs it")
        else:
            value = f"{options.get(key)!r:.80}"
            reason = problem["msg"].removeprefix("Value error, ")
            lines.append(f"adaskip.{key}: {value} is not allowed: {reason}")
    return "\n".join(dict.fromkeys(lines))


#: Options that are objects, and their keys.
_NESTED = {
    "prompt": "exit, skip, tail, from, busy",
    "prompt.busy": "enter, leave",
    "draft": ", ".join(DraftOptions.model_fields),
    "busy": ", ".join(BusyPlans.model_fields),
    "canary": ", ".join(CanaryOptions.model_fields),
    "busy.levels": ", ".join(Level.model_fields),
    "busy.levels.enter": ", ".join(Load._fields),
    "busy.levels.leave": ", ".join(Load._fields),
}


def _nested(problem: Any) -> str:
    """Explain what is wrong with a key of an option that is an object."""
    *where, key = map(str, problem["loc"])
    name = f"adaskip.{'.'.join(where)}.{key:.80}"
    if problem["type"] == "extra_forbidden":
        known = _NESTED[".".join(each for each in where if not each.isdigit())]
        return f"{name}: unknown option; allowed: {known}"
    return f"{name}: {shown(problem['input'])} is not allowed: {problem['msg']}"


def _unknown(key: str, method: str) -> str:
    known = [*AdaSkipConfig.model_fields, *method_of(method).Options.model_fields]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
    elsewhere = [name for name, other in METHODS.items() if key in other.Options.model_fields]
    hint = (
        f"it belongs to method {' or '.join(map(repr, elsewhere))}, but method is {method!r}"
        if elsewhere
        else f"did you mean {near!r}?"
    )
    allowed = f"allowed with method {method!r}: {', '.join(known)}"
    return f"adaskip.{key}: unknown option, {hint}; {allowed}"
