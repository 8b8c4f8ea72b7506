# SPDX-License-Identifier: Apache-2.0
"""A run's results: a folder of plain files that other tools can read.

``manifest.json`` says what was run, with what and where. Everything else is JSON lines, one
record a line, appended as it is measured, so that a killed run keeps all it had and goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from vllm_adaskip import old_names

FORMAT = 1
#: What a request's arguments of its prompt plan begin with.
PROMPT_KEY = "adaskip_prompt_"


class ResultsError(ValueError):
    """A results folder that cannot be used; the message names the file and the line."""


class Record(BaseModel):
    """Base of everything that is stored: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Setting(Record):
    """One way to run the model.

    Attributes:
        name: unique within a run, as it stands in tables, ``static 5-6``.
        family: what it is one of, for plots: ``dense``, ``random``, ``uniform``, ``exit``,
            ``plan`` (named by the user) or the method's name.
        method: the server's method.
        options: the method's own options.
        budget: largest share of decoder compute a decided plan may keep.
        skip: an explicit plan, which goes before the method; None: the method decides.
        prompt: what prompts leave out, as of option ``prompt``: ``{"exit": 24, "tail": 16}``.

    """

    name: str
    family: str
    method: str = "none"
    options: dict[str, Any] = {}
    budget: float = 1.0
    skip: list[int | str] | None = None
    prompt: dict[str, Any] = {}

    @field_validator("method")
    @classmethod
    def _method_by_new_name(cls, method: str) -> str:
        return old_names.method(method)


def prompt_arguments(prompt: dict[str, Any]) -> dict[str, Any]:
    """Return what a request says for a prompt plan that is written as option ``prompt``."""
    return {f"{PROMPT_KEY}{key}": value for key, value in prompt.items()}


class Answer(Record):
    """One item under one setting (``answers.jsonl``).

    Attributes:
        item: unique within the data set, ``sum/12``.
        score: the metric's value; larger is better, except for ``perplexity``.
        kept: share of decoder compute that generated tokens went through, in [0, 1]; under a
            prompt plan that the prompt's tokens and they did.
        skip: the plan that was followed; empty where ``left_out`` is given.
        tokens: how many tokens were generated.
        left_out: where each token decides for itself, ``[2 * num_layers]`` shares of the tokens
            after the first that left out each sub-layer, attention 0, MLP 0, attention 1, ...
        agreement: share of the generated tokens that the whole model would have chosen, after the
            same beginning; None: not measured.
        surprise: how much more likely, in nats a token, the whole model finds the token that it
            would have chosen.

    """

    setting: str
    item: str
    task: str
    metric: str
    score: float
    kept: float
    skip: list[int | str]
    tokens: int
    text: str
    left_out: list[float] | None = None
    agreement: float | None = None
    surprise: float | None = None


class Unread(Record):
    """An answer of an adapter, that the model without it has not read yet (``unread.jsonl``).

    Attributes:
        prompt: token ids; so is ``generated``, what came after them.

    """

    answer: Answer
    prompt: list[int]
    generated: list[int]


class Question(Record):
    """One item as it was asked, to be read beside its answers (``questions.jsonl``)."""

    item: str
    prompt: str
    references: list[str]


class Timing(Record):
    """One timed batch, and the same batch dense right before or after (``timings.jsonl``)."""

    setting: str
    round: int
    batch: int
    tokens: int
    seconds: float
    dense_seconds: float


class SweepCell(Record):
    """One damaged model against the whole one (``sweep.jsonl``), arXiv 2406.19384.

    Attributes:
        kind: decoder layers left out, or two neighbours exchanged.
        layers: the layers concerned, from 0.
        agreement: share of ``tokens`` whose top-1 equals the whole model's.
        loss: mean cross-entropy of the reference answers' tokens, in nats.

    """

    kind: Literal["delete", "swap"]
    layers: list[int]
    task: str
    tokens: int
    agreement: float
    loss: float


class OraclePoint(Record):
    """One point of an oracle's frontier (``oracle.jsonl``), arXiv 2410.20022.

    Attributes:
        candidates: ``skip`` (evenly spaced and codebook plans) or ``exit`` (first layers only).
        layers: average decoder layers a generated token goes through.
        score: mean score with the best allotment of plans to items at that average.

    """

    candidates: str
    metric: str
    layers: float
    score: float


class WholeAnswer(Record):
    """A prompt and what the whole model answers, as token ids (``whole-answers.jsonl``)."""

    item: str
    prompt: list[int]
    answer: list[int]
    text: str = ""


class PlanReading(Record):
    """How far answers under a plan are the whole model's (``plan-readings.jsonl``).

    Attributes:
        how: ``search`` and ``held out``: the whole model's answers of that half, read under the
            plan; ``answered``: answers that the engine gave under the plan, read at full depth;
            ``shortened``: the same where the plan is the prompt's, and the answer's none.
        agreement: of each answer, the share of tokens that are the whole model's choice.
        surprise: of each answer, nats a token by which the whole model prefers its own choice.
        loss: cross-entropy of the whole model's choices under the plan, in nats a token.
        texts: of each answer that was given under the plan.

    """

    how: Literal["search", "held out", "answered", "shortened"]
    skip: list[int | str]
    agreement: list[float]
    surprise: list[float]
    loss: float | None = None
    texts: list[str] = []


class StepTime(Record):
    """Seconds of a decode step, or until first tokens, one a round (``step-times.jsonl``).

    Attributes:
        stage: what takes turns in the same rounds.
        variant: ``stock``, ``dense`` (ours, nothing skipped), or a plan.

    """

    stage: str
    variant: str
    batch: int
    seconds: list[float]


class Manifest(Record):
    """What a run was.

    Attributes:
        model: path or hub id; ``fingerprint`` is that of its config.
        data: what the items came from, and how many.
        engine: vLLM's options that were not its defaults; empty where vLLM did not run.
        settings: by name, in the order of tables.
        inputs: what else decides a number, by name: digests of the model's files, of the questions
            and of profiles, the metric, the length of answers.
        chance: by task, the mean score of the best constant answer, where labels repeat.
        asked: how many items each setting is to answer.
        rounds: how many rounds of each setting are to be timed.
        versions: of Python and the packages that matter.

    """

    format: int = FORMAT
    command: str
    created: str
    model: str
    fingerprint: str
    num_layers: int
    data: dict[str, Any]
    engine: dict[str, Any] = {}
    settings: list[Setting]
    inputs: dict[str, str | int | bool] = {}
    chance: dict[str, float] = {}
    asked: int | None = None
    rounds: int = 0
    seed: int
    versions: dict[str, str]
    hardware: dict[str, Any]
    commit: str | None


#: Record type -> the file that holds it.
FILES: dict[type[Record], str] = {
    Answer: "answers.jsonl",
    Unread: "unread.jsonl",
    Question: "questions.jsonl",
    Timing: "timings.jsonl",
    SweepCell: "sweep.jsonl",
    OraclePoint: "oracle.jsonl",
    WholeAnswer: "whole-answers.jsonl",
    PlanReading: "plan-readings.jsonl",
    StepTime: "step-times.jsonl",
}
R = TypeVar("R", bound=Record)


class Results:
    """A results folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def manifest(self) -> Manifest:
        """Read the manifest.

        Raises:
            ResultsError: there is none, or it is not one.

        """
        path = self.folder / "manifest.json"
        try:
            text = path.read_text()
        except OSError as error:
            raise ResultsError(f"{path}: {error.strerror}; is {self.folder} a run?") from None
        return self._parse(Manifest, text, str(path))

    def write_manifest(self, manifest: Manifest) -> None:
        """Start the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "manifest.json"
        (part := path.with_suffix(".part")).write_text(manifest.model_dump_json(indent=1) + "\n")
        part.replace(path)

    def read(self, kind: type[R]) -> list[R]:
        """Read all records of a kind; none where nothing was measured.

        A last line without its end is what a killed run was writing; it is passed over.
        """
        path = self.folder / FILES[kind]
        if not path.exists():
            return []
        lines = path.read_text().split("\n")[:-1]
        return [self._parse(kind, line, f"{path}:{number}") for number, line in enumerate(lines, 1)]

    def append(self, records: Iterable[Record]) -> None:
        """Add records, each to its file, whole lines only."""
        for kind, lines in _by_kind(records):
            path = self.folder / FILES[kind]
            _cut_half_line(path)
            with path.open("a") as file:
                file.write("".join(f"{line}\n" for line in lines))

    def replace(self, kind: type[Record], records: Iterable[Record]) -> None:
        """Write all records of a kind anew."""
        (self.folder / FILES[kind]).unlink(missing_ok=True)
        self.append(records)

    @staticmethod
    def _parse(kind: type[R], text: str, where: str) -> R:
        try:
            return kind.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(map(str, first["loc"]))
            raise ResultsError(f"{where}: {key}: {first['msg']}") from None


def _cut_half_line(path: Path) -> None:
    """Take away a last line without its end, which is what a killed run was writing."""
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)  # the whole file is read only where there is something to cut
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def _by_kind(records: Iterable[Record]) -> Iterator[tuple[type[Record], list[str]]]:
    lines: dict[type[Record], list[str]] = {}
    for record in records:
        lines.setdefault(type(record), []).append(json.dumps(record.model_dump()))
    return iter(lines.items())
