# SPDX-License-Identifier: Apache-2.0
"""A run as it might come, made up, for tests of what is computed and shown from one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vllm_adaskip.classifiers import DecoderShape, SkipPlan
from vllm_adaskip.lab.evaluation.results import (
    Answer,
    Manifest,
    OraclePoint,
    Record,
    Results,
    Setting,
    SweepCell,
    Timing,
)
from vllm_adaskip.lab.evaluation.settings import DENSE, decided, plans
from vllm_adaskip.lab.evaluation.summary import Summary, summarise

TASKS = ["sentiment", "topic", "fact", "hop", "translate", "key", "sum", "column", "steps"]
LAYERS = 12
SHAPE = DecoderShape(LAYERS, 98304, 294912)
SETTINGS = [
    DENSE,
    *plans(["uniform", "random", "exit"], [0.9, 0.75, 0.6], LAYERS, draws=2, seed=1),
    *decided("adaskip", {"keep_first": 1}, [0.9, 0.75]),
]


def manifest(settings: list[Setting], **changes: object) -> Manifest:
    facts = {
        "command": "adaskip eval --out results",
        "created": "2026-01-01T00:00:00+00:00",
        "model": "bundled",
        "fingerprint": "0f3a",
        "num_layers": LAYERS,
        "data": {"source": "bundled", "limit": 40},
        "settings": settings,
        "seed": 0,
        "versions": {"python": "3.11.9", "vllm": "0.32.0"},
        "hardware": {"processor": "some CPU", "cores": 2},
        "commit": "c0ffee",
    }
    return Manifest.model_validate(facts | changes)


def answer(
    setting: str, item: str, score: float, skip: list[int | str] | None = None, **changes: object
) -> Answer:
    plan = SkipPlan.parse(skip or [], LAYERS)
    facts = {
        "setting": setting,
        "item": item,
        "task": item.rpartition("/")[0],
        "metric": "exact_match",
        "score": score,
        "kept": plan.share(SHAPE),
        "skip": plan.entries(),
        "tokens": 5,
        "text": "an answer",
    }
    return Answer.model_validate(facts | changes)


def timings(setting: str, ratios: list[float], batch: int = 16) -> list[Timing]:
    return [
        Timing(
            setting=setting, round=i, batch=batch, tokens=32, seconds=2 * ratio, dense_seconds=2.0
        )
        for i, ratio in enumerate(ratios)
    ]


def realistic(tasks: list[str] = TASKS, items: int = 40) -> Iterator[Record]:
    """A run as the bundled model might give it: deeper cuts lose more, mixed plans take longer."""
    rng = np.random.default_rng(7)
    luck = {f"{task}/{i}": rng.random() for task in tasks for i in range(items)}
    frailty = dict(zip(tasks, np.linspace(0.1, 1.6, len(tasks)), strict=True))
    harm = {"dense": 0.0, "uniform": 0.2, "random": 1.0, "exit": 1.6, "adaskip": 0.25}
    for setting in SETTINGS:
        for item, drawn in luck.items():
            skip = setting.skip
            if skip is None:
                wanted = round((1 - setting.budget) * 2 * LAYERS)
                middle = [f"{kind}:{layer}" for layer in range(4, 10) for kind in ("attn", "mlp")]
                skip = [*rng.permutation(middle)[:wanted].tolist()]
            lost = harm[setting.family] * frailty[item.rpartition("/")[0]]
            chance = 0.97 - lost * (1 - SkipPlan.parse(skip, LAYERS).share(SHAPE))
            yield answer(setting.name, item, float(drawn < chance), skip)
        kept = 1 - len(setting.skip or []) / LAYERS if setting.skip else setting.budget
        base = 1.06 if setting.method != "none" else 0.04 + 0.96 * kept
        if setting is not DENSE:
            for batch, extra in ((1, 0.02), (16, 0.0)):
                noise = rng.normal(0, 0.015, 7)
                yield from timings(setting.name, (base + extra + noise).tolist(), batch)
    for layers, kind in _damages():
        for task in tasks:
            where = 1 - np.exp(-layers[0] / 2.5) if layers[0] else 0.1
            agreement = float(np.clip(where - 0.08 * (len(layers) - 1) * frailty[task], 0, 1))
            yield SweepCell(
                kind=kind, layers=layers, task=task, tokens=200, agreement=agreement, loss=0.4
            )
    for candidates, bend in (("skip", 3.0), ("exit", 1.2)):
        for layers in range(2, LAYERS + 1):
            score = 0.97 * (1 - (1 - layers / LAYERS) ** bend)
            yield OraclePoint(
                candidates=candidates, metric="exact_match", layers=layers, score=score
            )


def _damages() -> Iterator[tuple[list[int], str]]:
    for size in (1, 3):
        yield from (([*range(i, i + size)], "delete") for i in range(LAYERS - size + 1))
    yield from (([i, i + 1], "swap") for i in range(LAYERS - 1))


def write(folder: Path, records: list[Record], settings: list[Setting] | None = None) -> Results:
    results = Results(folder)
    results.write_manifest(manifest(settings or SETTINGS))
    results.append(records)
    return results


PLAIN = Setting(name="skip 5", family="plan", skip=[5])


def summary(
    answers: list[Answer], times: list[Timing] | None = None, settings: list[Setting] | None = None
) -> Summary:
    return summarise(manifest(settings or [DENSE, PLAIN]), answers, times or [])
