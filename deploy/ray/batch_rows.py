# SPDX-License-Identifier: Apache-2.0
"""Rows of an offline job: read, checked one by one, and brought into one schema."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from vllm_adaskip.config import AdaSkipConfig
from vllm_adaskip.engine.request import Planner, RequestArgs
from vllm_adaskip.lab.data.json_lines import JsonError, parsed, parsed_object
from vllm_adaskip.model_executors.registry import FAMILIES

if TYPE_CHECKING:
    from deploy.ray.batch_args import BatchArgs

#: Of a row that can run. Arguments differ in keys and types from row to row, which a column
#: cannot: so plans are spelt out, sub-layer by sub-layer, and what is absent is null.
SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("prompt", pa.string()),
        ("adaskip_skip", pa.list_(pa.string())),
        ("adaskip_max_compute", pa.float64()),
        ("max_tokens", pa.int64()),
        ("temperature", pa.float64()),
    ]
)


class RowError(ValueError):
    """A row that cannot run; the message says why."""


def read(path: Path) -> Iterator[dict[str, Any] | RowError]:
    """Return the rows of a ``.jsonl`` or ``.parquet`` file; a line that is no row as its error.

    Raises:
        ValueError: a file of another kind.

    """
    if path.suffix == ".jsonl":
        with path.open("rb") as lines:
            yield from map(_parsed, lines)
    elif path.suffix == ".parquet":
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    else:
        raise ValueError(f"{path}: files of kind {path.suffix!r} are not read; .jsonl, .parquet")


def _parsed(line: bytes) -> dict[str, Any] | RowError:
    try:
        return parsed_object(line)
    except JsonError as error:
        return RowError(str(error))


@dataclass(frozen=True)
class RowCheck:
    """Turns rows into those of `SCHEMA`, by the engine's own rules.

    So a bad plan is found out before any engine is up, with the words of the server.

    Attributes:
        planner: of the job's model and options.
        max_tokens: of a row that does not say.
        temperature: of a row that does not say.

    """

    planner: Planner
    max_tokens: int
    temperature: float

    @classmethod
    def of(cls, args: BatchArgs) -> RowCheck:
        """Make the check of a job (`ValueError`: its options do not fit its model)."""
        from transformers import AutoConfig

        hf_config = AutoConfig.from_pretrained(args.model)
        names = hf_config.architectures or []
        family = next((FAMILIES[name] for name in names if name in FAMILIES), None)
        if family is None:
            raise ValueError(
                f"model: cannot skip in {' or '.join(names) or '?'}; supported: "
                f"{', '.join(FAMILIES)}"
            )
        facts = AdaSkipConfig.parse(args.adaskip).facts(family.shape(hf_config))
        return cls(Planner(facts), args.max_tokens, args.temperature)

    def __call__(self, number: int, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row of `SCHEMA` (`RowError`: this one cannot run)."""
        prompt = row.get("prompt")
        if not isinstance(prompt, str) or not prompt:
            raise RowError(f"prompt: {prompt!r:.80} is not allowed; allowed: a text")
        wanted = self._wanted(row.get("vllm_xargs"))
        return {
            "row": number,
            "prompt": prompt,
            **wanted,
            "max_tokens": _number(row, "max_tokens", int, self.max_tokens, 1),
            "temperature": _number(row, "temperature", float, self.temperature, 0),
        }

    def _wanted(self, xargs: object) -> dict[str, Any]:
        """Read ``vllm_xargs``, an object, or in Parquet the JSON of one."""
        if isinstance(xargs, str):
            try:
                xargs = parsed(xargs.encode())
            except ValueError as error:
                raise RowError(f"vllm_xargs: {error}") from None
        if xargs is not None and not isinstance(xargs, Mapping):
            raise RowError(f"vllm_xargs: {xargs!r:.80} is not allowed; allowed: an object")
        given = {key: value for key, value in (xargs or {}).items() if value is not None}
        for key in given:
            if not key.startswith("adaskip"):
                raise RowError(f"vllm_xargs: {key!r:.80} is not allowed; allowed: ours")
        try:
            plan = self.planner.wanted(given).plan
            args = RequestArgs.parse(given)
        except ValueError as error:
            raise RowError(str(error)) from None
        if not args.off and args.skip is None:
            return {"adaskip_skip": None, "adaskip_max_compute": args.budget}
        assert plan is not None
        mask = plan.mask().reshape(-1, 2)
        left_out = [
            f"{kind}:{layer}"
            for layer, pair in enumerate(mask)
            for kind, skipped in zip(("attn", "mlp"), pair, strict=True)
            if skipped
        ]
        return {"adaskip_skip": left_out, "adaskip_max_compute": args.budget}


def _number(
    row: Mapping[str, Any], key: str, kind: type[int] | type[float], default: float, least: int
) -> float:
    value = row.get(key)
    if value is None:
        return default
    fits = isinstance(value, int) or (kind is float and isinstance(value, float))
    if isinstance(value, bool) or not fits or not value >= least:
        raise RowError(f"{key}: {value!r:.80} is not allowed; allowed: {kind.__name__} >= {least}")
    return kind(value)
