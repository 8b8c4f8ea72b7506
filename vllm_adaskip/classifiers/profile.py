# SPDX-License-Identifier: Apache-2.0
"""A profile: a method's settings for one model, as a folder that a server reads.

``adaskip.json`` is plain data and treated as hostile input: its size is bounded, unknown keys
are errors, and nothing in it is ever run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vllm_adaskip import old_names
from vllm_adaskip.classifiers.plan import shown

File = TypeVar("File", bound=BaseModel)

FILE = "adaskip.json"
#: In a profile's folder, if it has any: LoRA in peft's format, see `lora`.
ADAPTER = "lora"
#: Whose tokens a profile's adapter is for: those that leave something out, or all.
Adapted = Literal["planned", "merged"]
FORMAT = 1
#: A profile is a page of settings; what is larger is something else.
LARGEST = 1 << 20
#: Options that no profile sets among its method's own.
_OPERATORS = frozenset(
    {"guard", "known_plans", "method", "profile", "prompt", "untested_accelerator"}
)
#: What makes two checkpoints the same decoder, as far as a plan is concerned.
_IDENTITY = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "vocab_size",
)


class ProfileError(ValueError):
    """A profile that cannot be used; the message names the file and what is wrong."""


def refuse_special(path: Path) -> None:
    """Refuse a pipe or a device (`ProfileError`): to open or read it may take for ever."""
    if path.exists() and not path.is_file():
        raise ProfileError(f"{path}: no regular file; a profile is a folder of regular files")


def fingerprint(hf_config: Mapping[str, Any]) -> str:
    """Return a short digest of a model's config: two decoders of one shape share it."""
    facts = {key: hf_config.get(key) for key in _IDENTITY}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def read_file(kind: type[File], path: Path) -> File:
    """Read a file of plain JSON.

    Raises:
        ProfileError: no such file, no regular file, too large, no JSON, a key or value not allowed.

    """
    refuse_special(path)
    try:
        if path.stat().st_size > LARGEST:
            raise ProfileError(f"{path}: larger than {LARGEST} bytes; this is no profile")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"{path}: {error}") from None
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        reason = first["msg"].removeprefix("Value error, ")
        raise ProfileError(f"{path}: {key}: {reason}") from None


def check_made_for(what: str, model: str, own: str, theirs: str) -> None:
    """Refuse what was made for a model of another fingerprint (`ProfileError`)."""
    if theirs != own:
        raise ProfileError(
            f"the {what} was made for {model!r:.200} (fingerprint {own}), "
            f"but this model's fingerprint is {theirs}; use a {what} made for this model"
        )


class Profile(BaseModel):
    """What ``adaskip.json`` holds.

    Attributes:
        method: the server's method; ``options`` are its own, and cannot name another.
        max_compute: largest share of decoder compute a decided plan may keep.
        guard: whether a server follows its plans only where they pay, see `AdaSkipConfig`.
        prompt: what prompts leave out, as the server's option ``prompt``; empty: nothing.
        adapter: whose tokens the LoRA adapter is for, if there is one.
        fingerprint: of the model's config, see `fingerprint`; ``model`` is its name, to read.
        metrics: figures of how it was made, to read.

    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: int = Field(default=FORMAT, ge=FORMAT, le=FORMAT)
    method: str
    options: dict[str, Any] = {}
    max_compute: float = Field(default=1.0, gt=0, le=1)
    guard: bool = False
    prompt: dict[str, Any] = {}
    adapter: Adapted = "merged"
    model: str
    fingerprint: str
    metrics: dict[str, float | int | str] = {}

    @model_validator(mode="before")
    @classmethod
    def _by_new_names(cls, given: Any) -> Any:
        return old_names.renamed(given, old_names.PROFILE) if isinstance(given, Mapping) else given

    @field_validator("method")
    @classmethod
    def _method_by_new_name(cls, method: str) -> str:
        return old_names.method(method)

    @field_validator("options")
    @classmethod
    def _are_no_operators(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Refuse what only a server's operator may say (`ValueError`): above all, what is code."""
        for key in sorted(_OPERATORS & options.keys()):
            raise ValueError(f"{key!r} ({shown(options[key])}) is not allowed here")
        return options

    def save(self, folder: Path) -> None:
        """Write the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Profile:
        """Read a folder.

        Raises:
            ProfileError: no such file, no regular file, too large, no JSON, a key or value
                not allowed.

        """
        return read_file(cls, folder / FILE)

    def check_model(self, hf_config: Mapping[str, Any]) -> None:
        """Refuse a model that the profile was not made for (`ProfileError`)."""
        self.check_fingerprint(fingerprint(hf_config))

    def check_fingerprint(self, theirs: str) -> None:
        """Do the same by the model's `fingerprint`."""
        check_made_for("profile", self.model, self.fingerprint, theirs)
