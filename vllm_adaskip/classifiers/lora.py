# SPDX-License-Identifier: Apache-2.0
"""The LoRA adapter of a profile, added to the weights as they are loaded.

In the weights it costs nothing per token; served as an adapter it would cost two more products in
every layer. A merged adapter is served to dense requests too; one for tokens under plans is a
second set of weights, see `engine/taught.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vllm_adaskip.classifiers.profile import ADAPTER, LARGEST, ProfileError

_PREFIX, _DOWN, _UP = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


class _Config(BaseModel):
    """What of peft's ``adapter_config.json`` changes the sum; other forms of LoRA are refused."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    peft_type: Literal["LORA"]
    r: int = Field(gt=0)
    lora_alpha: float = Field(gt=0)
    use_rslora: bool = False
    use_dora: Literal[False] = False
    fan_in_fan_out: Literal[False] = False
    bias: Literal["none"] = "none"
    rank_pattern: dict[str, int] = Field(default={}, max_length=0)
    alpha_pattern: dict[str, float] = Field(default={}, max_length=0)
    modules_to_save: list[str] | None = Field(default=None, max_length=0)


class Lora:
    """``W + scale * B A`` for every adapted weight ``W``, arXiv 2106.09685 equation 3."""

    def __init__(self, scale: float, pairs: dict[str, tuple[Tensor, Tensor]]) -> None:
        self._scale = scale
        #: Name of a weight in the checkpoint -> A ``[rank, in]`` and B ``[out, rank]``.
        self._pairs = pairs

    @classmethod
    def of(cls, profile: Path) -> Lora | None:
        """Read a profile's adapter, in peft's format; None: it has none.

        Raises:
            ProfileError: an adapter that cannot be merged.

        """
        folder = profile / ADAPTER
        if not folder.exists():
            return None
        path = folder / "adapter_config.json"
        try:
            if path.stat().st_size > LARGEST:
                raise ProfileError(f"{path}: larger than {LARGEST} bytes; this is no config")
            config = _Config.model_validate_json(path.read_text(encoding="utf-8"))
            tensors = load_file(path.with_name("adapter_model.safetensors"))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(map(str, first["loc"])) or "the file"
            raise ProfileError(f"{path}: {key}: {first['msg']}; allowed: plain LoRA") from None
        except (OSError, UnicodeDecodeError, SafetensorError) as error:
            raise ProfileError(f"{folder}: {error}") from None
        scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
        return cls(scale, _pairs(tensors, folder))

    def merged(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Return a checkpoint's weights, by name, with the adapter added (summed in float32).

        Raises:
            ProfileError: a shape that does not fit, or a weight the checkpoint does not have.

        """
        for name, weight, changed in self._both(weights):
            yield name, weight if changed is None else changed

    def beside(
        self, weights: Iterable[tuple[str, Tensor]], taught: dict[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Return a checkpoint's weights as they are; those with the adapter added are put aside.

        Raises:
            ProfileError: see `merged`.

        """
        for name, weight, changed in self._both(weights):
            if changed is not None:
                taught[name] = changed
            yield name, weight

    def _both(
        self, weights: Iterable[tuple[str, Tensor]]
    ) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """Return name and weight, and that with the adapter added; None: it has none."""
        left = dict(self._pairs)
        for name, weight in weights:
            if (pair := left.pop(name, None)) is None:
                yield name, weight, None
                continue
            down, up = (each.to(weight.device).float() for each in pair)
            if (up.shape[0], down.shape[1]) != weight.shape:
                raise ProfileError(
                    f"the profile's LoRA does not fit {name}: it is for "
                    f"{(up.shape[0], down.shape[1])}, the weight is {tuple(weight.shape)}"
                )
            yield name, weight, (weight.float() + self._scale * (up @ down)).to(weight.dtype)
        if left:
            raise ProfileError(f"the profile's LoRA changes {min(left)}, which the model lacks")


def _pairs(tensors: dict[str, Tensor], folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    names = {name.removesuffix(_DOWN).removesuffix(_UP) for name in tensors}
    pairs = {}
    for name in sorted(names):
        down, up = tensors.get(name + _DOWN), tensors.get(name + _UP)
        if not name.startswith(_PREFIX) or down is None or up is None:
            raise ProfileError(f"{folder}: {name!r:.200}: want pairs of lora_A and lora_B weights")
        fits = down.ndim == up.ndim == 2 and down.shape[0] == up.shape[1]
        if not fits or not (down.isfinite().all() and up.isfinite().all()):
            raise ProfileError(f"{folder}: {name!r:.200}: ranks differ, or values are not finite")
        pairs[f"{name.removeprefix(_PREFIX)}.weight"] = down, up
    if not pairs:
        raise ProfileError(f"{folder}: an adapter without weights")
    return pairs
