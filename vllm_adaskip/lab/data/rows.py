# SPDX-License-Identifier: Apache-2.0
"""Rows of a data file, with where each stands: JSON lines, a JSON array, CSV or Parquet."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_adaskip.lab.data.items import DataError
from vllm_adaskip.lab.data.json_lines import JsonError, parsed, read_lines

Rows = Iterator[tuple[str, dict[str, Any]]]
#: Columns of a table whose cells are JSON arrays.
_ARRAYS = ("messages", "tools", "references", "choices")


def read_rows(path: Path) -> Rows:
    """Return the rows of a file; by its suffix, else it is JSON.

    Raises:
        DataError: a file that cannot be read, or a row that is none.

    """
    try:
        if path.suffix in (".csv", ".tsv"):
            yield from _table(path)
        elif path.suffix == ".parquet":
            yield from _parquet(path)
        else:
            yield from _array(path) if _begins_as_array(path) else _lines(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None


def renamed(rows: Rows, columns: tuple[str, str]) -> Rows:
    """Return rows of a prompt (or messages) and a reference (or several) by these names alone."""
    for where, row in rows:
        for column in columns:
            if column not in row:
                raise DataError(f"{where}: no column {column!r:.80}; it has {', '.join(row)}")
        asked, answer = (row[column] for column in columns)
        yield (
            where,
            {
                "messages" if isinstance(asked, list) else "prompt": asked,
                "references" if isinstance(answer, list) else "reference": answer,
            },
        )


def _lines(path: Path) -> Rows:
    for number, found in read_lines(path):
        if isinstance(found, JsonError):
            raise DataError(f"{path}:{number}: {found}")
        yield f"{path}:{number}", found


def _begins_as_array(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1 << 12).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _array(path: Path) -> Rows:
    try:
        found = parsed(path.read_bytes())
    except JsonError as error:
        raise DataError(f"{path}: begins as a JSON array, but {error}") from None
    for number, row in enumerate(found, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path}: row {number} is {row!r:.60}; allowed: JSON objects")
        yield f"{path}: row {number}", row


def _table(path: Path) -> Rows:
    """Read a table whose first row names the columns; an empty cell is not there."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
            names = [name.strip() for name in next(rows, [])]
            if len(set(names)) < len(names):
                raise DataError(f"{path}: columns {', '.join(names)}; allowed: each name once")
            for cells in filter(None, rows):
                where = f"{path}:{rows.line_num}"
                if len(cells) != len(names):
                    raise DataError(
                        f"{where}: {len(cells)} cells; the first row names {len(names)}"
                    )
                yield where, _cells(dict(zip(names, cells, strict=True)), where)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: no UTF-8: {error.reason}; allowed: UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{path}:{rows.line_num}: no CSV: {error}") from None


def _cells(row: dict[str, str], where: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, cell in row.items():
        try:
            found[name] = parsed(cell.encode()) if name in _ARRAYS and cell else cell or None
        except JsonError as error:
            raise DataError(f"{where}: {name}: {error}; allowed: a JSON array") from None
    return found


def _parquet(path: Path) -> Rows:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError(f"{path}: Parquet wants pyarrow, which is not installed") from None
    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", {k: _without_null(v) for k, v in row.items()}
    except pa.ArrowException as error:
        raise DataError(f"{path}: no Parquet: {error}") from None


def _without_null(value: Any) -> Any:
    """Drop keys that a column's type added to objects that had none."""
    if isinstance(value, dict):
        return {key: _without_null(own) for key, own in value.items() if own is not None}
    return [*map(_without_null, value)] if isinstance(value, list) else value
