# SPDX-License-Identifier: Apache-2.0
"""What stopping inside prefill saves: time of a batch of one-token requests against dense.

All requests stop after the same layer, once because the server says so (``exit``), once because a
look at the prediction there says so (``adainfer``, whose look costs a norm and the LM head). Dense
requests take turns with them in the same engine. Ideally as large a share of the time falls away
as of the layers. On the bundled model, and at the shape of Llama-3.2-1B with random weights.

    python benchmarks/early_exit.py --rounds 15    # a third of them for the large one
"""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from reading_prompts import TOKENS, spread
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vllm_adaskip.lab.bench.engines import alone

alone()  # before torch is loaded, which reads the number of threads then


def main(
    rounds: Annotated[int, typer.Option(min=3)] = 15,
    large: Annotated[bool, typer.Option(help="Also time Llama-3.2-1B's shape.")] = True,
) -> None:
    """Time prefills that stop after a quarter, half and three quarters of the layers."""
    from transformers import AutoConfig

    from vllm_adaskip import bundled_model
    from vllm_adaskip.lab.bench.shapes import Shape

    table = Table(
        "model", "prompts", "layers run", "how", "time against dense", "of the layers' share",
        title=f"prefill of one-token requests, {TOKENS} tokens each (medians, quartiles)",
    )  # fmt: skip
    with TemporaryDirectory() as folder:
        cases: list[tuple[str, str, int, tuple[float, ...], int]]
        cases = [(bundled_model(), "bundled", 16, (0.25, 0.5, 0.75), rounds)]
        if large:
            shape = Shape.of("llama-3.2-1b").write(Path(folder))
            cases.append((shape, "Llama-3.2-1B's shape", 2, (0.5,), max(3, rounds // 3)))
        for model, name, prompts, parts, turns in cases:
            layers = AutoConfig.from_pretrained(model).num_hidden_layers
            for run in (round(part * layers) for part in parts):
                for how, options in ways(run).items():
                    taken = times(model, options, prompts, turns, f"{name}, {run} layers, {how}")
                    pruned = 1 - run / layers
                    reached = [(1 - one) / pruned for one in taken]
                    said = f"{run} of {layers}", how, spread(taken), spread(reached)
                    table.add_row(name, str(prompts), *said)
    Console().print(table)


def ways(layers: int) -> dict[str, dict[str, Any]]:
    """Return the options that have every request for one token stop after so many layers."""
    looked: dict[str, Any] = {"method": "adainfer", "check_layers": [layers - 1], "top_prob": 0.0}
    return {"exit": {"method": "exit", "layers": layers, "scope": "answer"}, "adainfer": looked}


def times(model: str, options: dict[str, Any], prompts: int, rounds: int, what: str) -> list[float]:
    """Return each round's time against dense."""
    from vllm import LLM

    from vllm_adaskip import engine_args

    llm = LLM(
        model,
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=512,
        max_num_batched_tokens=4096,
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
        **engine_args(**options),
    )
    found = []
    for round_ in track(range(rounds + 1), what):
        off: dict[str, str] = {"adaskip": "off"}
        order = [off, {}] if round_ % 2 else [{}, off]
        seconds = {bool(one): prefill(llm, one, prompts) for one in order}
        if round_:  # the first warms up
            found.append(seconds[False] / seconds[True])
    (report,) = llm.collective_rpc("adaskip_report")
    assert sum(report["exits"]) == prompts * (rounds + 1)
    llm.llm_engine.engine_core.shutdown()
    return found


def prefill(llm: Any, arguments: dict[str, str], prompts: int) -> float:
    """Return the seconds of one batch."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=1, ignore_eos=True, detokenize=False, extra_args=arguments
    )
    asked = [{"prompt_token_ids": [7 + one, *[9] * (TOKENS - 1)]} for one in range(prompts)]
    start = time.perf_counter()
    llm.generate(asked, params, use_tqdm=False)
    return time.perf_counter() - start


if __name__ == "__main__":
    typer.run(main)
