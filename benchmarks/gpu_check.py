# SPDX-License-Identifier: Apache-2.0
"""Whether mixed plans mean the same on a GPU, and what they save there.

First in float32: a batch of mixed plans, token for token, against the plain transformers loop of
the tests, on the CPU. Another order of summation may rightly choose another token where the two
best logits are close, so a first difference counts only if no gap up to there was below
``TOLERANCE``. Then in bfloat16: tokens per second of stock vLLM and of the plugin.

    python benchmarks/gpu_check.py --model MODEL
"""

from __future__ import annotations

import gc
import os
import random
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_USE_V2_MODEL_RUNNER="1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

#: Smallest gap of the two best logits at which both must choose the same token.
TOLERANCE = 1e-2
BATCHES = (1, 16, 64)
GENERATED = 128


def main(
    model: Annotated[str, typer.Option(help="A checkpoint; the bundled model if empty.")] = "",
    attention_backend: Annotated[str, typer.Option(help="One that does float32.")] = "TRITON_ATTN",
) -> None:
    """Check meaning, then time; leaves with 1 if a token is wrong."""
    device = find_gpu()
    from vllm_adaskip import bundled_model

    path = model or bundled_model()
    common = {
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": max(BATCHES),
        "gpu_memory_utilization": 0.5,
        "attention_backend": attention_backend,
        "skip_tokenizer_init": True,
    }
    wrong = {fill: check(path, fill, common) for fill in ("none", "copy", "project")}
    table = Table("kv_fill", "wrong tokens", title=f"float32, {device}, tolerance {TOLERANCE:g}")
    for fill, count in wrong.items():
        table.add_row(fill, str(count))
    Console().print(table)
    if any(wrong.values()):
        sys.exit(1)
    Console().print(timed(path, common))


def find_gpu() -> str:
    """Give the device's name; leave with a plain message where there is none."""
    import torch

    if not torch.cuda.is_available():
        sys.exit("gpu-check: no GPU here (torch.cuda.is_available() is False); nothing was checked")
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        sys.exit("gpu-check: this vLLM is a CPU build; install vLLM for the GPU")
    return str(torch.cuda.get_device_name())


def check(path: str, kv_fill: str, common: dict[str, Any]) -> int:
    """Give how many sequences of a batch of mixed plans have a wrong token."""
    from batches import greedy, random_plan, random_prompts
    from reference import Reference

    reference = Reference(path)
    rng = random.Random(0)
    prompts = random_prompts(0, 24, vocabulary=reference.model.config.vocab_size)
    plans = [random_plan(rng, reference.num_layers) for _ in prompts]
    llm = start(path, {**common, "dtype": "float32", "max_num_batched_tokens": 64}, kv_fill=kv_fill)
    assert llm.llm_engine.vllm_config.use_v2_model_runner
    got = greedy(llm, prompts, plans)
    stop(llm)
    wrong = 0
    for prompt, plan, tokens in zip(prompts, plans, got, strict=True):
        want, _ = reference.generate(prompt, plan, len(tokens), kv_fill=kv_fill)
        if tokens == want:
            continue
        first = next(
            at for at, pair in enumerate(zip(tokens, want, strict=True)) if len({*pair}) > 1
        )
        _, gap = reference.generate(prompt, plan, first + 1, kv_fill=kv_fill)
        wrong += gap >= TOLERANCE
    return wrong


def timed(path: str, common: dict[str, Any]) -> Table:
    """Decode batches with each engine, one engine after the other."""
    from transformers import AutoConfig

    layers = AutoConfig.from_pretrained(path).num_hidden_layers
    half = list(range(1, layers - 1, 2))
    engines: dict[str, dict[str, Any] | None] = {
        "stock": None,
        "plugin, nothing skipped": {},
        f"plugin, {len(half)} of {layers} layers skipped": {"method": "static", "skip": half},
    }
    table = Table("engine", *(f"batch {one}" for one in BATCHES), title="tokens/s, bfloat16, eager")
    for name, options in engines.items():
        llm = start(path, {**common, "dtype": "bfloat16"}, options is not None, **(options or {}))
        table.add_row(name, *(f"{speed(llm, size):,.0f}" for size in BATCHES))
        stop(llm)
    return table


def start(path: str, engine: dict[str, Any], ours: bool = True, **options: Any) -> Any:
    """Start an engine, ours or stock."""
    from vllm import LLM

    from vllm_adaskip import engine_args

    plugin = engine_args(untested_accelerator=True, **options) if ours else {}
    return LLM(path, **engine, **plugin)


def stop(llm: Any) -> None:
    """Shut an engine down, so that the next has its memory."""
    import torch

    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    torch.cuda.empty_cache()


def speed(llm: Any, sequences: int) -> float:
    """Give generated tokens per second of one batch, the better of three after a warm-up."""
    from batches import greedy

    prompts = [[7 + one % 5] * 16 for one in range(sequences)]
    taken = []
    for _ in range(4):
        begin = time.perf_counter()
        greedy(llm, prompts, [None] * sequences, GENERATED)
        taken.append(time.perf_counter() - begin)
    return sequences * GENERATED / min(taken[1:])


if __name__ == "__main__":
    typer.run(main)
