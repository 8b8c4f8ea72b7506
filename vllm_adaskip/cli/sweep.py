# SPDX-License-Identifier: Apache-2.0
"""``adaskip sweep``: what a model bears when layers are deleted or swapped."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from vllm_adaskip.cli.run import (
    COLUMNS,
    ApplyChatTemplate,
    Columns,
    Data,
    Limit,
    Model,
    Seed,
    asked,
    described,
    loaded,
    plain_errors,
)

if TYPE_CHECKING:
    from vllm_adaskip.lab.data.items import Item
    from vllm_adaskip.lab.evaluation.results import SweepCell
    from vllm_adaskip.lab.evaluation.sleb import Step
    from vllm_adaskip.lab.evaluation.sweep import Damage, Judge, Sweep


def sweep(
    out: Annotated[Path, typer.Option(help="Folder for the results; an earlier run goes on.")],
    model: Model = "",
    data: Data = "bundled",
    columns: Columns = "",
    apply_chat_template: ApplyChatTemplate = False,
    limit: Limit = 100,
    seed: Seed = 0,
    max_block: Annotated[int, typer.Option(min=1, help="Longest block of layers deleted.")] = 4,
    sleb_steps: Annotated[
        int | None, typer.Option(min=0, help="Layers deleted greedily; half of them if left out.")
    ] = None,
    sleb_protected: Annotated[
        int, typer.Option(min=0, help="Layers at each end that the greedy search keeps.")
    ] = 1,
    end: Annotated[
        bool, typer.Option(help="The end-of-sequence token is the answer's last.")
    ] = True,
    batch: Annotated[int, typer.Option(min=1, help="Samples read at once.")] = 16,
) -> None:
    """Delete and swap decoder layers of a frozen model, and compare it with the whole one.

    The model reads prompts with their reference answers, in transformers, on a GPU if there is
    one. Damage is to all tokens, the prompt's too; a skip plan spares the prompt.
    """
    console = Console()
    with plain_errors():
        from vllm_adaskip.lab.evaluation.manifest import asking, start_or_resume
        from vllm_adaskip.lab.evaluation.results import Results
        from vllm_adaskip.lab.evaluation.sweep import Sweep, damages

        items, source = asked(
            data, limit, seed, "exact_match", None, model, columns, apply_chat_template
        )
        results = Results(out)
        run = described(model, source, seed)
        steps = run.num_layers // 2 if sleb_steps is None else sleb_steps
        plan = damages(run.num_layers, max_block)
        start_or_resume(results, asking(run, [], items, end=end))
        with console.status("loading the model, reading the items with it whole"):
            if not model:
                _one_thread()
            cells = Sweep(results, _judge(run.model, items, end, batch))
        with Progress(*COLUMNS, console=console) as progress:
            _measure(cells, plan, progress)
            order = _greedy(cells, steps, sleb_protected, progress)
    console.print(_table(cells, plan))
    if order:
        console.print(_order_table(cells, order))


def _one_thread() -> None:
    """Use one thread, unless the user chose: the bundled model is too small to share a step."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def _judge(model: str, items: Sequence[Item], end: bool, batch: int) -> Judge:
    """Load the model and tokenize the items."""
    from transformers import AutoTokenizer

    from vllm_adaskip.lab.data.tokens import end_tokens
    from vllm_adaskip.lab.evaluation.sweep import Judge
    from vllm_adaskip.lab.fitting.samples import sample

    tokenizer = AutoTokenizer.from_pretrained(model)
    ends = end_tokens(model, tokenizer) if end else []
    return Judge(loaded(model), [sample(item, tokenizer, ends) for item in items], batch)


def _measure(cells: Sweep, plan: Sequence[Damage], progress: Progress) -> None:
    done = sum(map(cells.measured, plan))
    bar = progress.add_task("deleting and swapping", total=len(plan), completed=done)
    for damage in plan:
        if not cells.measured(damage):
            cells.cells(damage)
            progress.advance(bar)


def _greedy(cells: Sweep, steps: int, protected: int, progress: Progress) -> list[Step]:
    from vllm_adaskip.lab.evaluation import sleb
    from vllm_adaskip.lab.evaluation.sweep import overall

    num_layers = cells.judge.num_layers
    bar = progress.add_task("deleting greedily", total=sleb.trials(num_layers, steps, protected))

    def loss(damage: Damage) -> float:
        found = overall(cells.cells(damage))[1]
        progress.advance(bar)
        return found

    return list(sleb.sleb_order(loss, num_layers, steps, protected))


def _table(cells: Sweep, plan: Sequence[Damage]) -> Table:
    whole = cells.cells(plan[0])
    table = Table(
        *("damage", "layers", "top-1 as whole", "answers' loss", "worst task"),
        title=f"{sum(cell.tokens for cell in whole)} answer tokens, {len(whole)} tasks",
        caption="loss: cross-entropy of the reference answers in nats",
        box=SIMPLE_HEAD,
    )
    for damage in plan:
        table.add_row(damage.kind if damage.layers else "none", *_row(cells.cells(damage)))
    return table


def _order_table(cells: Sweep, order: Sequence[Step]) -> Table:
    table = Table(
        *("step", "deleted", "all deleted", "top-1 as whole", "answers' loss", "worst task"),
        title="layers in the order in which they are missed least (SLEB)",
        box=SIMPLE_HEAD,
    )
    for number, step in enumerate(order, 1):
        table.add_row(str(number), str(step.deleted[-1]), *_row(cells.cells(step.damage)))
    return table


def _row(cells: Sequence[SweepCell]) -> list[str]:
    """Layers, agreement and loss over all tokens, and the task with the least agreement."""
    from vllm_adaskip.lab.evaluation.sweep import overall

    agreement, loss = overall(cells)
    worst = min(cells, key=lambda cell: cell.agreement)
    least = f"{worst.task} {worst.agreement:.1%}" if worst.agreement < 1 else ""
    layers = ", ".join(map(str, cells[0].layers))
    return [layers, f"{agreement:.1%}", f"{loss:.2g}", least]
