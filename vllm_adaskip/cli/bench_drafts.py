# SPDX-License-Identifier: Apache-2.0
"""``adaskip bench drafts``: what drafts are worth on the clock, on this machine."""

from __future__ import annotations

import json
import os
import random
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vllm_adaskip.cli import run
from vllm_adaskip.cli.bench import Rounds, saying


def drafts(
    model: Annotated[
        str, typer.Argument(help="Path or hub id; the bundled model if left out.")
    ] = "",
    draft: Annotated[
        list[str] | None,
        typer.Option(
            help="A draft, as adaskip.draft has it, such as '{\"exit\": 4}'; repeatable. "
            "If left out: a third of the layers."
        ),
    ] = None,
    profile: Annotated[
        str, typer.Option(help="A profile that engines with drafts serve, as of `fit heal`.")
    ] = "",
    data: run.Questions = "",
    columns: run.Columns = "",
    apply_chat_template: run.ApplyChatTemplate = False,
    limit: Annotated[int, typer.Option(min=1, help="Questions of each task, or built-in.")] = 32,
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, max=128, help="Requests at once; repeatable. 1, 4, 16."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=8, help="Of an answer, at most.")] = 64,
    rounds: Rounds = 5,
    dtype: Annotated[str, typer.Option(help="vLLM's.")] = "auto",
    seed: run.Seed = 0,
    out: Annotated[Path, typer.Option(help="Folder for drafts.json.")] = Path("build/bench"),
) -> None:
    """Answer questions with and without drafts, turn by turn, beside vLLM's n-gram drafts.

    All compiled but the second, in one process, on one thread, with MODEL's own weights; under
    --profile the engines with drafts answer as its adapter makes them.
    """
    console = Console()
    with run.plain_errors(stopped="stopped; nothing is kept"):
        from vllm_adaskip.lab.bench.engines import alone

        alone()
        os.environ.setdefault("TQDM_DISABLE", "1")
        from vllm_adaskip.lab.models import model_path

        path = model_path(model)
        options = _options(draft, path)
        items, _ = run.questions(path, data, limit, seed, columns, apply_chat_template)
        items = random.Random(seed).sample(items, len(items))  # rounds see all tasks
        from transformers import AutoTokenizer
        from vllm import SamplingParams

        from vllm_adaskip.lab.bench.drafts import compare, started, told
        from vllm_adaskip.lab.bench.variants import STOCK
        from vllm_adaskip.lab.data.tokens import end_tokens
        from vllm_adaskip.lab.scan.answers import tokenised

        prompts, longest = tokenised(items, path, tokens)
        params = SamplingParams(
            temperature=0, max_tokens=tokens, detokenize=False,
            stop_token_ids=end_tokens(path, AutoTokenizer.from_pretrained(path)),
        )  # fmt: skip
        batches = sorted({*(batch or (1, 4, 16))})
        engines: dict[str, Any] = {
            "max_model_len": longest + tokens,
            "max_num_seqs": max(batches),
            "dtype": dtype,
        }
        out.mkdir(parents=True, exist_ok=True)
        found = []
        with saying(console) as say:
            begun = say("starting engines", 1)
            most = max(one.get("tokens", 4) for one in options.values())
            with started(path, options, most, profile, **engines) as llms:
                begun()
                prompts = told(llms[STOCK], prompts, params)
                for size in batches:
                    done = say(f"batch {size}", len(llms) * (rounds + 1))
                    found += compare(llms, prompts, size, params, rounds, done)
                    text = json.dumps([asdict(one) for one in found], indent=1)
                    (out / "drafts.json").write_text(text + "\n")
    columns_ = "variant", "a token", "against stock vLLM", "tokens a step", "stock's answers"
    table = Table("batch", *columns_, box=SIMPLE_HEAD)
    for one in found:
        table.add_row(
            str(one.batch),
            one.variant,
            f"{one.per_token.middle * 1e3:.2f} ms",
            str(one.against_stock),
            f"{one.per_step:.2f}",
            "{} of {}".format(*one.equal),
        )
    console.print(table)
    console.print(
        "A ratio above 1 is faster than stock vLLM. In 16-bit types verification rounds otherwise "
        "than single steps do, so answers may part where two tokens are nearly as likely; with "
        "--dtype float32 they are the same."
    )
    console.print("Written:", str(out / "drafts.json"))


def _options(texts: list[str] | None, path: str) -> dict[str, dict[str, Any]]:
    """Return the drafts, by what they are called."""
    from vllm_adaskip.config import AdaSkipConfig

    if not texts:
        from transformers import AutoConfig

        layers = AutoConfig.from_pretrained(path).get_text_config().num_hidden_layers
        texts = [json.dumps({"exit": max(1, layers // 3)})]
    found = {}
    for text in texts:
        one = run.parsed(text, "--draft", dict)
        AdaSkipConfig.parse({"draft": one})
        found[f"drafts {text}"] = one
    return found
