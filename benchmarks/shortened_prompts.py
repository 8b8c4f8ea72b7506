# SPDX-License-Identifier: Apache-2.0
"""Time to first token of prompts whose tokens, but the last 16, stop after some layers.

Beside compiled stock vLLM, in turns, in one process, with made-up weights. The bound counts
multiplications: what is left out falls away, but the projections that make K/V of it. With
``--answer`` it is the time until all answers are complete, and the bound is still the prompts'.

    python benchmarks/shortened_prompts.py --model smollm2-135m --rounds 9
    python benchmarks/shortened_prompts.py --model smollm2-135m --batch 16 --answer 32
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from vllm_adaskip.engine.prompt_plan import TAIL
from vllm_adaskip.lab.bench.engines import (
    Arguments,
    alone,
    engine,
    first_tokens,
    whole_answers,
)
from vllm_adaskip.lab.bench.rounds import ratio, take_turns
from vllm_adaskip.lab.bench.shapes import Shape
from vllm_adaskip.offline import request

alone()  # before torch is loaded, which reads the number of threads then

STOCK = "stock vLLM"


def main(
    model: Annotated[str, typer.Option(help="As of adaskip bench.")] = "smollm2-135m",
    tokens: Annotated[int, typer.Option(min=32, help="Of each prompt.")] = 1000,
    batch: Annotated[list[int] | None, typer.Option(help="Prompts at once, 1 and 8.")] = None,
    answer: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 1,
    rounds: Annotated[int, typer.Option(min=3)] = 9,
) -> None:
    """Time whole prompts, and prompts of which 9, 7.5 and 5 tenths of the layers run."""
    shape = Shape.of(model)
    timed = partial(first_tokens, tokens=tokens)
    if answer > 1:
        timed = partial(whole_answers, prompt=tokens, tokens=answer)
    table = Table(
        "prompts", "layers run", "stock's time over ours", "bound",
        title=f"{shape.name}, prompts of {tokens} tokens, tail {TAIL}; answers of {answer}",
    )  # fmt: skip
    layers = shape.num_layers
    exits = sorted({layers, *(round(share * layers) for share in (0.9, 0.75, 0.5))}, reverse=True)
    with TemporaryDirectory() as folder, ExitStack() as stack:
        path, room = shape.write(Path(folder) / "model"), {"max_model_len": tokens + answer + 7}
        stock, ours = (
            stack.enter_context(engine(path, plugin=plugin, **room))
            for plugin in (None, {"prompt": {"exit": layers}})
        )
        with Progress() as progress:
            for size in batch or [1, 8]:
                variants = {STOCK: partial(timed, stock, [None] * size)}
                for run in exits:
                    arguments: Arguments = [request(prompt_exit=run)] * size
                    variants[str(run)] = partial(timed, ours, arguments)
                task = progress.add_task(f"{size} at once", total=len(variants) * (rounds + 1))
                taken = take_turns(variants, rounds, partial(progress.advance, task))
                for run in exits:
                    speed = str(ratio(taken, STOCK, str(run)))
                    table.add_row(
                        str(size), f"{run}/{layers}", speed, f"{bound(shape, run, tokens):.2f}"
                    )
    Console().print(table)


def bound(shape: Shape, run: int, tokens: int) -> float:
    """Return how many times fewer multiplications a prompt takes of which so many layers run."""
    config = shape.config
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    keys_and_values = 2 * config["hidden_size"] * size * config["num_key_value_heads"]
    queries_and_output = 2 * config["hidden_size"] * size * heads
    mlp = 3 * config["hidden_size"] * config["intermediate_size"]
    seen = 2 * size * heads * tokens / 2  # the mean token's attention
    layer = keys_and_values + queries_and_output + mlp + seen
    share = TAIL / tokens
    kept = run * layer + (shape.num_layers - run) * (keys_and_values * (1 - share) + layer * share)
    return shape.num_layers * layer / kept


if __name__ == "__main__":
    typer.run(main)
