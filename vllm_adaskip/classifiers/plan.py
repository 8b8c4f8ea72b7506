# SPDX-License-Identifier: Apache-2.0
"""The skip plan: which sub-layers of the decoder a sequence leaves out while it decodes."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_SUB_LAYER = re.compile(r"(attn|mlp):(\d{1,9})", re.ASCII)
_FORMS = 'a decoder layer such as 5, or one sub-layer such as "attn:7" or "mlp:8"'


class PlanError(ValueError):
    """A skip plan that cannot be followed; the message names the value and what is allowed."""


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """What a plan is weighed against: depth, and parameters of one layer's two sub-layers."""

    num_layers: int
    attention_parameters: int
    mlp_parameters: int

    @property
    def layer_parameters(self) -> int:
        """Parameters of a layer."""
        return self.attention_parameters + self.mlp_parameters

    def kept(self, attention: float, mlp: float) -> float:
        """Share of decoder compute without so many attention and MLP sub-layers, by parameters."""
        skipped = attention * self.attention_parameters + mlp * self.mlp_parameters
        return 1.0 - skipped / (self.num_layers * self.layer_parameters)


@dataclass(frozen=True, slots=True)
class SkipPlan:
    """An immutable set of attention and MLP sub-layers to leave out.

    ``attention`` and ``mlp`` are bit masks: bit ``l`` set means that the sub-layer of
    decoder layer ``l`` (counted from 0) is left out. So union, equality and hash cost a
    few integer operations whatever the depth.
    """

    num_layers: int
    attention: int = 0
    mlp: int = 0

    @classmethod
    def parse(cls, entries: object, num_layers: int) -> SkipPlan:
        """Read ``[5, 6, "attn:7", "mlp:8"]``: whole layers as ints, sub-layers as strings.

        Raises:
            PlanError: not a list, more entries than sub-layers, an entry of another form, a
                layer that does not exist, or a plan that leaves out every sub-layer.

        """
        entries = as_entries(entries)
        if len(entries) > 2 * num_layers:
            raise PlanError(
                f"a skip plan of {len(entries)} entries is not allowed; allowed: at most "
                f"{2 * num_layers}, the sub-layers of this model's {num_layers} layers"
            )
        attention = mlp = 0
        for entry in entries:
            kind, layer = parse_entry(entry)
            if not 0 <= layer < num_layers:
                raise PlanError(
                    f"{shown(entry)} names a decoder layer that does not exist; "
                    f"this model has layers 0 to {num_layers - 1}"
                )
            attention |= (kind != "mlp") << layer
            mlp |= (kind != "attn") << layer
        plan = cls(num_layers, attention, mlp)
        if plan.skips_everything:
            raise PlanError(
                f"{shown(entries)} leaves out all {2 * num_layers} sub-layers; "
                "at least one must run"
            )
        return plan

    @classmethod
    def of_mask(cls, mask: NDArray[np.bool_]) -> SkipPlan:
        """Return the plan that `mask` says, ``[2 * num_layers]``."""
        attention, mlp = (
            sum(1 << int(layer) for layer in np.flatnonzero(mask[first::2])) for first in (0, 1)
        )
        return cls(len(mask) // 2, attention, mlp)

    @property
    def is_dense(self) -> bool:
        """True when nothing is left out."""
        return not (self.attention or self.mlp)

    @property
    def skips_everything(self) -> bool:
        """True when no sub-layer is left; such a plan cannot run."""
        return self.attention & self.mlp == (1 << self.num_layers) - 1

    def __or__(self, other: SkipPlan) -> SkipPlan:
        """Return the plan that leaves out what either plan leaves out."""
        if self.num_layers != other.num_layers:
            raise PlanError(f"plans of {self.num_layers} and {other.num_layers} layers do not mix")
        return SkipPlan(self.num_layers, self.attention | other.attention, self.mlp | other.mlp)

    def share(self, shape: DecoderShape) -> float:
        """Share of decoder compute that is kept, in [0, 1], weighted by parameters."""
        return shape.kept(self.attention.bit_count(), self.mlp.bit_count())

    def mask(self) -> NDArray[np.bool_]:
        """Return ``[2 * num_layers]`` bools, True: left out; in the order attn 0, mlp 0, attn 1."""
        size = -(-self.num_layers // 8)
        packed = self.attention.to_bytes(size, "little") + self.mlp.to_bytes(size, "little")
        bits = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), bitorder="little")
        return bits.reshape(2, -1)[:, : self.num_layers].T.reshape(-1).astype(np.bool_)

    def entries(self) -> list[int | str]:
        """Return the list that `parse` reads back: whole layers first, then single sub-layers."""
        whole = self.attention & self.mlp
        return [
            *_bits(whole),
            *(f"attn:{layer}" for layer in _bits(self.attention & ~whole)),
            *(f"mlp:{layer}" for layer in _bits(self.mlp & ~whole)),
        ]

    def __str__(self) -> str:
        """``skip 5-6, attn:7``, or ``dense``."""
        if self.is_dense:
            return "dense"
        whole = self.attention & self.mlp
        parts = [
            *_ranges("", whole),
            *_ranges("attn:", self.attention & ~whole),
            *_ranges("mlp:", self.mlp & ~whole),
        ]
        return "skip " + ", ".join(parts)


def as_entries(entries: object) -> Sequence[object]:
    """Return the entries of a plan, each still as it came (`PlanError` if they are no list)."""
    if isinstance(entries, str | bytes) or not isinstance(entries, Sequence):
        raise PlanError(f"{shown(entries)} is no skip plan; allowed: a list, each entry {_FORMS}")
    return entries


def parse_entry(entry: object) -> tuple[str, int]:
    """Return ``("layer" | "attn" | "mlp", layer index)`` of one entry."""
    if isinstance(entry, int) and not isinstance(entry, bool):
        return "layer", entry
    if isinstance(entry, str) and (match := _SUB_LAYER.fullmatch(entry)):
        return match[1], int(match[2])
    raise PlanError(f"{shown(entry)} is no part of a skip plan; allowed: {_FORMS}")


class _Short(reprlib.Repr):
    """Looks at no more of a value than it shows, so that a huge one costs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlist = self.maxtuple = self.maxdict = 20
        self.maxstring = self.maxother = 80

    def repr_int(self, x: int, level: int) -> str:
        """Leave out large numbers: their digits may take long, or be refused by Python."""
        return "an integer beyond 64 bits" if x.bit_length() > 64 else repr(x)


def shown(value: object) -> str:
    """Return a value as an error's message shows it, in 80 characters at most."""
    text = _Short().repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def reason(error: BaseException) -> str:
    """Return in short what somebody else's code raised, as a message of ours shows it."""
    return f"{type(error).__name__}: {error!s:.200}"


def _bits(mask: int) -> Iterator[int]:
    return (layer for layer in range(mask.bit_length()) if mask >> layer & 1)


def _ranges(prefix: str, mask: int) -> Iterator[str]:
    """``5-6`` for each run of set bits."""
    layers = list(_bits(mask))
    for index, layer in enumerate(layers):
        if index and layers[index - 1] == layer - 1:
            continue
        last = layer
        while mask >> (last + 1) & 1:
            last += 1
        yield f"{prefix}{layer}" if last == layer else f"{prefix}{layer}-{last}"
