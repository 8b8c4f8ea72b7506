# SPDX-License-Identifier: Apache-2.0
"""When running a sub-layer for everybody, and discarding some, is cheaper than a gather. Pure.

Rows that leave a sub-layer out save its arithmetic, but the others have to be gathered and
scattered, and attention needs metadata for them. Where few leave it out, or where a few rows more
cost nothing because weights are read anyway, it is cheaper to run it for all and to put back the
rows of those who left it out. Where the two meet depends on machine and model: ``adaskip bench
crossover`` measures it and writes the table that is read here. What attention costs a row grows
with its context, so of attention the table holds up to the measured context; beyond it rows are
gathered.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

Kind = Literal["attention", "mlp", "layer"]
Tokens = Annotated[int, Field(ge=1, le=1 << 20)]
#: Above this a file is none of ours.
_LARGEST = 1 << 16


def _rising(rows: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    if [step for step, _ in rows] != sorted({step for step, _ in rows}):
        raise ValueError("sizes of steps must rise")
    return rows


#: ``(tokens of the step, from so many on all are run)``, by tokens of the step.
Rows = Annotated[tuple[tuple[Tokens, Tokens], ...], AfterValidator(_rising), Field(max_length=64)]


class Crossover(BaseModel):
    """The table, by what the same tokens need; where a part is empty rows are always gathered.

    Attributes:
        format: of the file.
        context: tokens, the mean over a step's sequences up to which what has attention holds.
        attention: of attention sub-layers alone.
        mlp: of MLPs alone.
        layer: of both of a layer, which one gather serves.

    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    context: Tokens = 1
    attention: Rows = ()
    mlp: Rows = ()
    layer: Rows = ()

    def within(self, context: float) -> Crossover:
        """Give what of the table holds for sequences of so many tokens in the mean."""
        return self if context <= self.context else self._beyond

    @cached_property
    def _beyond(self) -> Crossover:
        return self.model_copy(update={"attention": (), "layer": ()})

    def runs_all(self, kind: Kind, running: int, tokens: int) -> bool:
        """Tell whether what some of a step's tokens need is run for all of them.

        Args:
            kind: what it is.
            running: tokens that need it.
            tokens: of the step.

        """
        rows: tuple[tuple[int, int], ...] = getattr(self, kind)
        if not rows:
            return False
        # Between two measured sizes the share of the larger holds; beyond the last, its own.
        size, first = next((row for row in rows if row[0] >= tokens), rows[-1])
        return running * size >= first * tokens

    @classmethod
    def load(cls, path: str) -> Crossover:
        """Read a table.

        Raises:
            ValueError: there is no such file, or it is no such table; the message says which.

        """
        try:
            with Path(path).open("rb") as file:
                text = file.read(_LARGEST + 1)
            if len(text) > _LARGEST:
                raise ValueError(f"longer than {_LARGEST} bytes")
            return cls.model_validate(json.loads(text))
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            place = ".".join(map(str, problem["loc"]))
            raise ValueError(
                f"{path!r:.200} is no crossover table: {place}: {problem['msg']}"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path!r:.200} is no crossover table: {error}") from None
