# SPDX-License-Identifier: Apache-2.0
"""An offline job on Ray Data: ``python -m deploy.ray.batch prompts.jsonl answers``.

Each row brings its own plan. The job can be stopped at any time and run again.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from logging import ERROR, getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pyarrow as pa
import typer
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from deploy.ray.batch_args import BatchArgs
from deploy.ray.batch_parts import Parts, digest
from deploy.ray.batch_rows import SCHEMA, RowCheck, RowError, read
from vllm_adaskip.classifiers.hub import CONTENTS, located
from vllm_adaskip.lab.digest import commit_of, of_folder, of_model

if TYPE_CHECKING:
    from ray.data import Dataset

#: Arguments that answers depend on; with others a job cannot be resumed.
_MEANING = {"model", "adaskip", "max_model_len", "engine_kwargs"}
_MEANING |= {"part_rows", "max_tokens", "temperature"}


def main(
    source: Annotated[Path, typer.Argument(help="Rows: .jsonl or .parquet.", exists=True)],
    target: Annotated[Path, typer.Argument(help="Folder of the answers.")],
    config: Annotated[Path | None, typer.Option(help="YAML, see deploy/ray/batch.yaml.")] = None,
) -> None:
    """Answer every row of SOURCE; what is already in TARGET is left as it is."""
    try:
        args = BatchArgs.model_validate(yaml.safe_load(config.read_text()) if config else {})
        check = RowCheck.of(args)
        meaning = args.model_dump(include=_MEANING)
        parts = Parts(target, {"input": digest(source), **meaning, **_files(args)})
        job = Job.plan(source, check, parts, args.part_rows)
    except ValueError as error:
        raise SystemExit(f"deploy.ray.batch: {error}") from None
    columns = TextColumn("rows"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("rows", total=job.total, completed=job.total - job.missing)
        if job.tables:
            start_ray(args)
            for row in answered(job.tables, args):
                job.take(row)
                progress.advance(bar)
    print(f"{job.total} rows in {target}: {job.kept} were there, {job.failed} of the others failed")


def _files(args: BatchArgs) -> dict[str, str]:
    """Return digests of the model's and the profile's files, whose names may stay the same."""
    from transformers import AutoConfig

    commit = commit_of(AutoConfig.from_pretrained(args.model))
    found = {"model files": of_model(args.model, commit)}
    if (profile := args.adaskip.get("profile")) is not None:
        found["profile files"] = of_folder(located(str(profile)), CONTENTS)
    return found


@dataclass
class Part:
    """A part under way: how many rows are missing, and those that are there."""

    missing: int
    ids: dict[int, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Job:
    """What is still to be done, and where it goes.

    Attributes:
        parts: the output.
        tables: rows to answer, a table of `SCHEMA` for each part.
        under_way: those parts.
        part_rows: rows in a part.
        total: rows of the input.
        kept: rows that an earlier run has answered.
        failed: rows of this run with an error instead of an answer.

    """

    parts: Parts
    part_rows: int
    tables: list[pa.Table] = field(default_factory=list)
    under_way: dict[int, Part] = field(default_factory=dict)
    total: int = 0
    kept: int = 0
    failed: int = 0

    @classmethod
    def plan(cls, source: Path, check: RowCheck, parts: Parts, part_rows: int) -> Job:
        """Read the input, leave out the parts that are done, and note rows that cannot run."""
        job = cls(parts, part_rows)
        rows = enumerate(read(source))
        while chunk := list(islice(rows, part_rows)):
            number = job.total // part_rows
            job.total += len(chunk)
            if parts.is_done(number):
                job.kept += len(chunk)
            else:
                job._add(number, chunk, check)
        return job

    @property
    def missing(self) -> int:
        """Rows without an answer so far."""
        return sum(part.missing for part in self.under_way.values())

    def _add(
        self, number: int, chunk: Iterable[tuple[int, dict[str, Any] | RowError]], check: RowCheck
    ) -> None:
        good: list[dict[str, Any]] = []
        part = self.under_way[number] = Part(0, {})
        for index, row in chunk:
            try:
                if isinstance(row, RowError):
                    raise row
                part.ids[index] = row.get("id")
                good.append(check(index, row))
            except RowError as error:
                self._note(part, index, error=str(error))
        part.missing = len(good)
        if good:
            self.tables.append(pa.Table.from_pylist(good, SCHEMA))
        else:
            self._finish(number)

    def take(self, answer: Mapping[str, Any]) -> None:
        """Note an answer; the last one of a part writes it."""
        index = int(answer["row"])
        number = index // self.part_rows
        part = self.under_way[number]
        if error := answer["__inference_error__"]:
            self._note(part, index, error=error)
        else:
            text, tokens = answer["generated_text"], int(answer["num_generated_tokens"])
            self._note(part, index, text=text, tokens=tokens)
        part.missing -= 1
        if part.missing == 0:
            self._finish(number)

    def _note(self, part: Part, index: int, **facts: Any) -> None:
        self.failed += "error" in facts
        empty = {"text": None, "tokens": 0, "error": None}
        part.rows.append({"row": index, "id": part.ids.get(index), **empty, **facts})

    def _finish(self, number: int) -> None:
        self.parts.write(number, self.under_way.pop(number).rows)


def start_ray(args: BatchArgs) -> None:
    """Join the cluster that RAY_ADDRESS names, or start one for the job."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if "RAY_ADDRESS" in os.environ:
        ray.init(**quiet)
    else:
        # One core more than the engines, for what is done around them.
        cores = max(os.cpu_count() or 1, args.replicas * args.cpus + 1)
        ray.init("local", num_cpus=cores, **quiet)
    getLogger("ray").setLevel(ERROR)
    getLogger("ray.data").setLevel(ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # ours counts rows


def answered(tables: list[pa.Table], args: BatchArgs) -> Iterator[dict[str, Any]]:
    """Return each row with its answer, in the order in which engines are done."""
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    processor = build_processor(
        vLLMEngineProcessorConfig(
            model_source=args.model,
            engine_kwargs=args.engine,
            runtime_env=args.runtime_env,
            placement_group_config=args.placement_group,
            accelerator_type=args.accelerator_type,
            concurrency=(args.replicas, args.replicas),
            batch_size=args.batch_rows,
            # What one row does wrong is that row's.
            should_continue_on_error=True,
            # vLLM does these itself.
            chat_template_stage=False,
            tokenize_stage=False,
            detokenize_stage=False,
        ),
        preprocess=as_request,
        preprocess_map_kwargs={"num_cpus": 0.5},
        postprocess_map_kwargs={"num_cpus": 0.5},
    )
    dataset: Dataset = processor(ray.data.from_arrow(tables))
    yield from dataset.iter_rows()


def as_request(row: dict[str, Any]) -> dict[str, Any]:
    """Return what the processor takes of a row of `SCHEMA`."""
    return {
        "prompt": row["prompt"],
        "sampling_params": {
            "max_tokens": row["max_tokens"],
            "temperature": row["temperature"],
            "extra_args": {key: row[key] for key in ("adaskip_skip", "adaskip_max_compute")},
        },
    }


if __name__ == "__main__":
    typer.run(main)
