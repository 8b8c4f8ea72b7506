# SPDX-License-Identifier: Apache-2.0
"""Whether plans mean the same on a GPU under CUDA graphs, and what they save there.

First in float32: batches of mixed plans, of one plan and of none, token for token, against the
plain transformers loop of the tests, on the CPU. Another order of summation may rightly choose
another token where the two best logits are close, so a first difference counts only if no gap up
to there was below ``TOLERANCE``. Then in bfloat16, with made-up weights of real shapes: decode
steps beside stock vLLM with its graphs, in turns.

    python benchmarks/gpu_check.py
"""

from __future__ import annotations

import gc
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_USE_V2_MODEL_RUNNER="1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

#: Smallest gap of the two best logits at which both must choose the same token.
TOLERANCE = 1e-2
BATCHES = (1, 4, 16, 64, 256)
SHAPES = ("llama-3.2-1b", "llama-3.1-8b")
#: Tokens of a prompt, and decode steps of a round.
CONTEXT, STEPS, ROUNDS = 128, 32, 7
#: Of one engine; several stand side by side.
KV_BYTES = 6 << 30

console = Console(width=140)


def main(
    shape: Annotated[list[str] | None, typer.Option(help="Of the speed table.")] = None,
    meaning: Annotated[bool, typer.Option(help="Compare tokens.")] = True,
    speed: Annotated[bool, typer.Option(help="Time steps.")] = True,
    eager: Annotated[bool, typer.Option(help="No compilation, no graphs.")] = False,
    backend: Annotated[str, typer.Option(help="For float32, which not all can.")] = "TRITON_ATTN",
    out: Annotated[Path | None, typer.Option(help="Where the figures go, as JSON.")] = None,
) -> None:
    """Check meaning, then time; leaves with 1 if a token is wrong."""
    device = find_gpu()
    found: dict[str, Any] = {"device": device, "eager": eager}
    if meaning:
        found["wrong"] = compared(device, eager, backend)
    if speed:
        found["seconds"] = {name: timed(name, device, eager) for name in shape or SHAPES}
    if out is not None:
        out.write_text(json.dumps(found, indent=1))
    if any(case["wrong"] for case in found.get("wrong", {}).values()):
        sys.exit(1)


def find_gpu() -> str:
    """Return the device's name; leave with a plain message where there is none."""
    import torch

    if not torch.cuda.is_available():
        sys.exit("gpu-check: no GPU here (torch.cuda.is_available() is False); nothing was checked")
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        sys.exit("gpu-check: this vLLM is a CPU build; install vLLM for the GPU")
    return str(torch.cuda.get_device_name())


def compared(device: str, eager: bool, backend: str) -> dict[str, Any]:
    """Compare tokens for each ``kv_fill``; print and return what was wrong."""
    from helpers.reference import Reference

    from vllm_adaskip import bundled_model

    reference = Reference(bundled_model())
    table = Table(
        *("kv_fill", "plans", "sequences", "wrong", "steps in a graph"),
        title=f"float32, {device}, {'eager' if eager else 'compiled, graphs'}, {backend}",
    )
    found = {}
    for fill in ("none", "copy", "project"):
        for case, result in compare(reference, fill, eager, backend).items():
            found[f"{fill}, {case}"] = result
            table.add_row(fill, case, *map(str, result.values()))
    console.print(table)
    return found


def compare(reference: Any, kv_fill: str, eager: bool, backend: str) -> dict[str, dict[str, int]]:
    """Run batches on one engine; count sequences with a wrong token."""
    from helpers.batches import greedy, random_plan, random_prompts

    from vllm_adaskip import bundled_model

    rng = random.Random(0)
    layers = reference.num_layers
    prompts = random_prompts(0, 24, vocabulary=reference.model.config.vocab_size)
    shared = [3, 4, "attn:6", "mlp:7", layers - 2]
    cases: dict[str, list[Any]] = {
        "mixed": [random_plan(rng, layers) for _ in prompts],
        "one for all": [shared] * len(prompts),
        "one for five": [shared] * 5,
        "dense": [[]] * len(prompts),
        "half dense": [shared, []] * (len(prompts) // 2),
    }
    llm = start(
        bundled_model(),
        {"kv_fill": kv_fill, "known_plans": [shared]},
        dtype="float32",
        max_num_batched_tokens=64,
        max_num_seqs=32,
        max_model_len=512,
        enforce_eager=eager,
        attention_backend=backend,
        kv_cache_memory_bytes=1 << 30,
    )
    assert llm.llm_engine.vllm_config.use_v2_model_runner
    found = {}
    for case, plans in cases.items():
        before = replayed(llm)
        got = greedy(llm, prompts[: len(plans)], plans)
        wrong = sum(
            is_wrong(reference, *one, kv_fill) for one in zip(prompts, plans, got, strict=False)
        )
        found[case] = {"sequences": len(plans), "wrong": wrong, "graph": replayed(llm) - before}
    stop(llm)
    return found


def replayed(llm: Any) -> int:
    """Return how many steps ran as a graph so far."""
    return int(llm.collective_rpc("adaskip_report")[0].get("graphs", {"replayed": 0})["replayed"])


def is_wrong(reference: Any, prompt: Any, plan: Any, tokens: list[int], kv_fill: str) -> bool:
    """Return whether tokens differ from the reference where they had to be the same."""
    want, _ = reference.generate(prompt, plan, len(tokens), kv_fill=kv_fill)
    if tokens == want:
        return False
    first = next(at for at, pair in enumerate(zip(tokens, want, strict=True)) if len({*pair}) > 1)
    _, gap = reference.generate(prompt, plan, first + 1, kv_fill=kv_fill)
    return bool(gap >= TOLERANCE)


def timed(name: str, device: str, eager: bool) -> dict[str, dict[str, float]]:
    """Decode batches on all engines in turns; print and return seconds a step."""
    from vllm_adaskip.lab.bench.plans import deal, distinct, shared
    from vllm_adaskip.lab.bench.rounds import ratio, take_turns
    from vllm_adaskip.lab.bench.shapes import Shape

    whole = Shape.of(name)
    layers = whole.num_layers
    one = shared(layers)
    kept = layers - one.attention.bit_count()
    found = {}
    with TemporaryDirectory() as folder, ExitStack() as stack:
        engines = {}
        for engine, model, options in (
            ("stock", whole.write(Path(folder) / "whole"), None),
            ("smaller", whole.of_depth(kept).write(Path(folder) / "half"), None),
            ("plugin", str(Path(folder) / "whole"), {"known_plans": [one.entries()]}),
        ):
            begin = time.perf_counter()
            engines[engine] = start(
                model,
                options,
                dtype="bfloat16",
                load_format="dummy",
                max_model_len=1024,
                max_num_seqs=max(BATCHES),
                enforce_eager=eager,
                enable_prefix_caching=False,
                kv_cache_memory_bytes=KV_BYTES,
            )
            stack.callback(stop, engines[engine])
            console.print(f"{name}: {engine} started in {time.perf_counter() - begin:.0f} s")
        table = Table(
            *("batch", "stock", "again", "plugin, dense", "one plan", "smaller", "one plan again"),
            *("2 plans", "8 plans"),
            title=f"{name}, {device}, ms a step; a ratio above 1 is faster than stock",
        )
        for batch in BATCHES:
            plans = {
                "plugin, dense": [[]] * batch,
                "one plan": [one.entries()] * batch,
                "one plan again": [one.entries()] * batch,
                **{
                    f"{count} plans": [
                        plan.entries() for plan in deal(distinct(layers, count), batch)
                    ]
                    for count in (2, 8)
                    if count <= batch
                },
            }
            runs: dict[str, Callable[[], float]] = {
                "stock": stepping(engines["stock"], [None] * batch),
                "again": stepping(engines["stock"], [None] * batch),
                "smaller": stepping(engines["smaller"], [None] * batch),
                **{case: stepping(engines["plugin"], each) for case, each in plans.items()},
            }
            taken = take_turns(runs, ROUNDS, lambda: None)
            found[str(batch)] = {case: statistics.median(each) for case, each in taken.items()}
            cells = []
            for column in table.columns[1:]:
                case = str(column.header)
                if case not in taken:
                    cells.append("")
                    continue
                against = ratio(taken, "stock", case)
                cells.append(f"{statistics.median(taken[case]) * 1e3:.3f}\n{against}")
            table.add_row(str(batch), *cells)
        console.print(table)
        report = engines["plugin"].collective_rpc("adaskip_report")[0]
        console.print(f"graphs: {report.get('graphs')}")
    gc.collect()
    return found


def stepping(llm: Any, plans: list[Any]) -> Callable[[], float]:
    """Return what times a decode step of a batch: the mean of many in a row."""
    from vllm_adaskip.lab.bench.engines import Batch

    arguments = [None if plan is None else {"adaskip_skip": plan} for plan in plans]

    def run() -> float:
        batch = Batch(llm, arguments, prompt=CONTEXT, tokens=STEPS + 16)
        batch.prefill()
        for _ in range(6):
            batch.step()
        begin = time.perf_counter()
        for _ in range(STEPS):
            batch.step()
        taken = time.perf_counter() - begin
        batch.end()
        return taken / STEPS

    return run


def start(path: str, options: dict[str, Any] | None, **engine: Any) -> Any:
    """Start an engine: stock, or ours with options."""
    from vllm import LLM

    from vllm_adaskip import engine_args

    plugin = {} if options is None else engine_args(**options)
    # Several stand side by side, each with a K/V cache of a given size.
    return LLM(path, skip_tokenizer_init=True, gpu_memory_utilization=0.3, **engine, **plugin)


def stop(llm: Any) -> None:
    """Shut an engine down, so that the next has its memory."""
    import torch

    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    typer.run(main)
