# SPDX-License-Identifier: Apache-2.0
"""How good early exits by token would be if deeper K/V were always exact.

EE-LLM and others run tokens that stopped through the deeper layers later, with the next token that
goes there, so that no token reads K/V that are not the model's own. The engine does not. What it
would bring in quality is seen here, with transformers in float32, one question at a time: each
token runs all layers, and its prediction is taken from where AdaInfer's rule stops.

    python benchmarks/recompute.py PROFILE [PROFILE ...]    # of scope token
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_adaskip import bundled_model
from vllm_adaskip.classifiers.adainfer.fit.head import FinalHead
from vllm_adaskip.classifiers.adainfer.gate import features
from vllm_adaskip.classifiers.adainfer.method import AdaInferOptions
from vllm_adaskip.classifiers.adainfer.rule_file import load_rule
from vllm_adaskip.classifiers.adainfer.rules import ExitRule
from vllm_adaskip.classifiers.profile import Profile
from vllm_adaskip.lab.data.metrics import METRICS
from vllm_adaskip.lab.data.sources import load_items
from vllm_adaskip.lab.evaluation.quality import interval


@torch.inference_mode()
def main(
    profiles: Annotated[list[Path], typer.Argument(help="Of method adainfer, scope token.")],
    limit: Annotated[int, typer.Option(min=1, help="Questions of each task.")] = 100,
    max_tokens: Annotated[int, typer.Option(min=1)] = 32,
) -> None:
    """Answer the bundled model's held-out questions under each profile's rule."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(bundled_model(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    head = FinalHead(model, [5, 6, 7])
    items = load_items("bundled", limit=limit)
    table = Table(
        "profile", "layers left out", "exact match", "loss to dense, points",
        title="exits by token with exact K/V in all layers (95 % intervals, paired by item)",
    )  # fmt: skip
    dense = np.ones(0)
    for folder in (None, *profiles):
        rule = None if folder is None else rule_of(folder)
        scores, depths = [], []
        for item in track(items, str(folder or "dense")):
            ids = tokenizer.encode(item.prompt)
            found, ran = answer(model, head, ids, rule, max_tokens, tokenizer.eos_token_id)
            score = METRICS[item.metric]
            assert score is not None
            scores.append(score(tokenizer.decode(found, skip_special_tokens=True), item.references))
            depths += ran
        own = np.array(scores)
        dense = dense if len(dense) else own
        loss = interval(dense - own)
        left_out = 1 - np.mean(depths) / model.config.num_hidden_layers
        points = (100 * one for one in (loss.mean, loss.low, loss.high))
        table.add_row(
            str(folder or "dense"),
            f"{left_out:.1%}",
            f"{own.mean():.1%}",
            "{:.1f} ({:.1f} to {:.1f})".format(*points),
        )
    Console().print(table)


def rule_of(folder: Path) -> ExitRule:
    """Load a profile's rule."""
    options = AdaInferOptions.model_validate(Profile.load(folder).options)
    return load_rule(options.classifier, folder)


def answer(
    model: Any, head: FinalHead, ids: list[int], rule: ExitRule | None, most: int, end: int
) -> tuple[list[int], list[int]]:
    """Return an answer's tokens, and how many layers each after the first would have run."""
    layers = model.config.num_hidden_layers
    output = model(torch.tensor([ids]))
    found, depths = [int(output.logits[0, -1].argmax())], []
    while len(found) < most and found[-1] != end:
        output = model(
            torch.tensor([[found[-1]]]),
            past_key_values=output.past_key_values,
            output_hidden_states=True,
        )
        logits, depth = output.logits[0, -1:], layers
        seen = np.zeros((1, 2))
        for layer in rule.layers if rule else ():
            here = head.logits(output.hidden_states[layer + 1][0, -1:])
            settled, seen = rule.settled(layer, features(here).double().numpy(), seen)
            if settled[0]:
                logits, depth = here, layer + 1
                break
        found.append(int(logits.argmax()))
        depths.append(depth)
    return found, depths


if __name__ == "__main__":
    typer.run(main)
