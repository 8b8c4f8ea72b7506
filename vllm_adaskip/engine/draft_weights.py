# SPDX-License-Identifier: Apache-2.0
"""Layers that draft better than the model's own first ones: a folder that `fit draft` writes.

They are the model's first layers, trained to say what the whole model says, but for K and V, so
that they read the model's own cache; and a matrix by which they hear what the whole model made of
the token before (EAGLE, arXiv 2401.15077). The model itself stays as it is. ``draft.json`` and
``draft.safetensors`` are plain data and treated as hostile input.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError

from vllm_adaskip.classifiers.profile import (
    ProfileError,
    check_made_for,
    fingerprint,
    read_file,
    refuse_special,
)

if TYPE_CHECKING:
    from torch import Tensor

FILE, TENSORS = "draft.json", "draft.safetensors"
FORMAT = 1
#: Ids of the tokens that drafts may have, ``[tokens]`` int64; and ``[hidden, hidden]``, which turns
#: what the LM head took into a part of the next token's embedding.
VOCABULARY, HEARS = "vocabulary", "hears.weight"
#: What K and V are made of, which drafts do not change.
_SHARED = re.compile(r"\.(k_proj|v_proj|qkv_proj)\.")
_NAME = re.compile(r"model\.(?:layers\.(\d+)\.[a-z0-9_.]+|norm\.weight)")


class DraftProfile(BaseModel):
    """What ``draft.json`` holds.

    Attributes:
        exit: first layers that draft.
        model: name of the model that it is for, to read.
        fingerprint: of that model's config, see `classifiers.profile.fingerprint`.
        metrics: figures of how it was made, to read.

    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: int = Field(default=FORMAT, ge=FORMAT, le=FORMAT)
    exit: int = Field(ge=1)
    model: str
    fingerprint: str
    metrics: dict[str, float | int | str] = {}

    def save(self, folder: Path) -> None:
        """Write the file."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> DraftProfile:
        """Read a folder's file.

        Raises:
            ProfileError: see `read_file`.

        """
        return read_file(cls, folder / FILE)

    def check_model(self, hf_config: Mapping[str, Any]) -> None:
        """Refuse a model that the layers were not made for (`ProfileError`)."""
        check_made_for("draft", self.model, self.fingerprint, fingerprint(hf_config))


class DraftWeights(NamedTuple):
    """What ``draft.safetensors`` holds.

    Attributes:
        layers: of layers and norm, by the names of the model's checkpoint.
        vocabulary: None: drafts may have all tokens.
        hears: None: drafts start from the token alone.

    """

    layers: dict[str, Tensor]
    vocabulary: Tensor | None
    hears: Tensor | None


def read_weights(folder: Path, exit: int, width: int) -> DraftWeights:
    """Return the weights for a model whose hidden states are so wide.

    Raises:
        ProfileError: no such file, or a tensor that does not belong there.

    """
    from safetensors.torch import load_file

    path = folder / TENSORS
    refuse_special(path)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ProfileError(f"{path}: {error}") from None
    vocabulary = tensors.pop(VOCABULARY, None)
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        is_foreign = not match or int(match[1] or 0) >= exit or _SHARED.search(name)
        if is_foreign and name != HEARS:
            raise ProfileError(
                f"{path}: {name!r:.200} is not allowed; allowed: weights of the first {exit} "
                "layers but for K and V, and the final norm"
            )
        if not (tensor.is_floating_point() and tensor.isfinite().all()):
            raise ProfileError(f"{path}: {name!r:.200}: values are not finite")
    hears = tensors.pop(HEARS, None)
    if hears is not None and hears.shape != (width, width):
        raise ProfileError(f"{path}: {HEARS!r} is {[*hears.shape]}; allowed: [{width}, {width}]")
    if vocabulary is not None and (vocabulary.ndim != 1 or vocabulary.is_floating_point()):
        raise ProfileError(f"{path}: {VOCABULARY!r} is no list of token ids")
    return DraftWeights(tensors, vocabulary, hears)
