# SPDX-License-Identifier: Apache-2.0
"""Stock vLLM beside the plugin with nothing skipped: what having it loaded costs.

The engines live in one process and take turns, round by round, so that drift of the
machine falls on all. Prints the ratio of stock's time to the plugin's (1.00: no cost), and
as a control that of stock's time to a second stock engine's: what the noise alone gives.

    python benchmarks/off_is_free.py --rounds 15
"""

from __future__ import annotations

import os
import statistics
import time
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_LOGGING_LEVEL="ERROR",
    OMP_NUM_THREADS="1",
)

#: name -> sequences, prompt tokens, generated tokens
CASES = {
    "decode, batch 1": (1, 8, 96),
    "decode, batch 16": (16, 8, 96),
    "decode, batch 64": (64, 8, 96),
    "prefill, 16 prompts of 240": (16, 240, 1),
}


def main(rounds: Annotated[int, typer.Option(min=3)] = 15, model: str = "") -> None:
    """Time both engines on every case."""
    from vllm import LLM

    from vllm_adaskip import bundled_model, engine_args
    from vllm_adaskip.engine.compat import enable_amx

    enable_amx()
    common: dict[str, Any] = {
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 64,
        "enable_prefix_caching": False,
        "distributed_executor_backend": "uni",
    }
    path = model or bundled_model()
    engines = {
        "stock": LLM(path, **common),
        "plugin": LLM(path, **common, **engine_args()),
        "stock again": LLM(path, **common),
    }
    times: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
    for round_ in track(range(rounds + 1), "rounds"):
        for case, shape in CASES.items():
            order = list(engines) if round_ % 2 else reversed(engines)
            taken = {name: run(engines[name], *shape) for name in order}
            if round_:  # the first warms up
                times[case].append(taken)
    table = Table(
        "case", "stock", "stock / plugin", "stock / stock again", title="medians, quartiles"
    )
    for case, taken_in_rounds in times.items():
        stock = statistics.median(taken["stock"] for taken in taken_in_rounds)
        ratios = [ratio(taken_in_rounds, name) for name in ("plugin", "stock again")]
        table.add_row(case, f"{stock * 1e3:.1f} ms", *ratios)
    Console().print(table)


def ratio(taken_in_rounds: list[dict[str, float]], name: str) -> str:
    """Give stock's time over another's, round by round: median and quartiles."""
    ratios = [taken["stock"] / taken[name] for taken in taken_in_rounds]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def run(llm: Any, sequences: int, prompt: int, generated: int) -> float:
    """Give the seconds of one batch."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=generated, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": [7 + one % 5] * prompt} for one in range(sequences)]
    start = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - start


if __name__ == "__main__":
    typer.run(main)
