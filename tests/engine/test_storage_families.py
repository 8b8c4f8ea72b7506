# SPDX-License-Identifier: Apache-2.0
"""Quantised weights, and keys and values in fp8, in every family.

Log-probabilities of each token's candidates are compared with those of the float32 loop, which has
the dequantised weights, or cuts keys and values off to fp8. Random weights put the best tokens so
near each other that bfloat16 kernels may choose another, so the loop reads the engine's own tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import quantised
from helpers.batches import Entries, random_plan, run_with_changes
from helpers.families import CASES, LAYERS, Matrix
from helpers.reference import Reference, distance
from helpers.tiny import write_model

from vllm_adaskip import engine_args
from vllm_adaskip.support import QUANTISED

TOKENS = 14
#: Family -> the first case of it.
OF_FAMILY = {case.architecture: name for name, case in reversed(CASES.items())}
#: Those whose head size vLLM's CPU kernels take no fp8 for -> one that they take.
HEADS = {"llama": {"head_dim": 96}, "qwen3": {"head_dim": 64}}


@quantised.needs_avx512
@pytest.mark.parametrize(
    ("name", "kind"),
    [(OF_FAMILY[family], kind) for family, kinds in QUANTISED.items() for kind in kinds],
)
def test_quantised_weights(
    tmp_path: Path, engine: Callable[..., Any], name: str, kind: str
) -> None:
    """What kernels round is far less than what a plan changes; ``project`` uses their weights."""
    matrix = Matrix(tmp_path, engine)
    path, dequantised = quantised.write(matrix.checkpoint(name), tmp_path, kind)
    options = {"dtype": "bfloat16", **engine_args(kv_fill="project")}
    off, of_dense, without_fill = distances(
        matrix.make(name, model=path, **options), Reference(dequantised), "project"
    )
    assert off < 0.25 * of_dense and off < without_fill, (off, of_dense, without_fill)


@quantised.needs_avx512
@pytest.mark.parametrize(
    ("name", "kv_fill"), [*((name, "copy") for name in OF_FAMILY.values()), ("llama", "project")]
)
def test_keys_and_values_in_fp8(
    tmp_path: Path, engine: Callable[..., Any], name: str, kv_fill: str
) -> None:
    """Float32 elsewhere, so but for values next to a step of fp8 all is the same."""
    config = {**CASES[name].config, **HEADS.get(name, {})}
    path = write_model(tmp_path / "model", CASES[name].family, **config)
    options = {"kv_cache_dtype": "fp8", **engine_args(kv_fill=kv_fill)}
    llm = Matrix(tmp_path, engine).make(name, model=path, **options)
    off, of_dense, without_fill = distances(llm, Reference(path, torch.float8_e4m3fn), kv_fill)
    assert off < 0.005 < 0.03 < min(of_dense, without_fill), (off, of_dense, without_fill)


def distances(llm: Any, reference: Reference, kv_fill: str) -> tuple[float, float, float]:
    """Return how far log-probabilities are from the loop's in the mean of a batch of mixed plans.

    And from what it says without a plan, and without fills, which are read, as plans change on
    the way.
    """
    rng = random.Random(110)
    plans: list[Entries] = [[], *(random_plan(rng, LAYERS) for _ in range(9))]
    prompts = [[rng.randrange(512) for _ in range(3 + 5 * at)] for at in range(len(plans))]
    changes = [(rng.randint(2, 8), random_plan(rng, LAYERS)) for _ in plans]
    outputs = run_with_changes(llm, prompts, plans, changes, TOKENS, logprobs=5)
    off = of_dense = without_fill = 0.0
    for prompt, plan, then, output in zip(prompts, plans, changes, outputs, strict=True):
        one = prompt, output, reference
        off += distance(*one, plan, then, kv_fill) / len(plans)
        of_dense += distance(*one, []) / len(plans)
        without_fill += distance(*one, plan, then) / len(plans)
    return off, of_dense, without_fill
