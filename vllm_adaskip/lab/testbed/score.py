# SPDX-License-Identifier: Apache-2.0
"""Held-out exact match per task, with transformers' own greedy generation.

python -m vllm_adaskip.lab.testbed.score MODEL_DIR --n 200
"""

import argparse
import csv
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from vllm_adaskip.lab.testbed import tasks
from vllm_adaskip.lab.testbed.tasks import Sample

BATCH = 50
# Training draws from seed 0; the held-out questions come from this one and from the test split.
HELD_OUT_SEED = 1000


@dataclass(frozen=True)
class Score:
    """How many of the questions of a task were answered exactly."""

    task: str
    asked: int
    right: int

    @property
    def share(self) -> float:
        """Exact match."""
        return self.right / self.asked

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval of the exact match."""
        z, n, p = 1.96, self.asked, self.share
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model as any user of transformers would."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    return model, AutoTokenizer.from_pretrained(folder)


def delete_layers(model: PreTrainedModel, deleted: Iterable[int]) -> None:
    """Take decoder layers out; the others are renumbered for the cache's sake."""
    gone = set(deleted)
    kept = [layer for index, layer in enumerate(model.model.layers) if index not in gone]
    for index, layer in enumerate(kept):
        layer.self_attn.layer_idx = index
    model.model.layers = nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)


@torch.no_grad()
def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: list[Sample]
) -> list[str]:
    """Answer the questions greedily, in batches."""
    texts: list[str] = []
    for start in range(0, len(questions), BATCH):
        prompts = [question.prompt for question in questions[start : start + BATCH]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        made = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=12,
            do_sample=False,
        )
        new = made[:, inputs["input_ids"].shape[1] :]
        texts += tokenizer.batch_decode(new, skip_special_tokens=True)
    return texts


def questions_of(task: str, n: int, seed: int) -> list[Sample]:
    """Draw `n` different questions; fewer if the test split has no more."""
    drawn = islice(tasks.stream(task, "test", seed), 30 * n)
    return list(islice(dict.fromkeys(drawn), n))


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    n: int,
    seed: int = HELD_OUT_SEED,
) -> Score:
    """Ask `n` different held-out questions of one task."""
    questions = questions_of(task, n, seed)
    given = answers(model, tokenizer, questions)
    right = sum(a == q.answer for a, q in zip(given, questions, strict=True))
    return Score(task, len(questions), right)


def score_all(folder: Path, n: int, deleted: Iterable[int] = ()) -> list[Score]:
    """Score every task with these layers deleted."""
    model, tokenizer = load(folder)
    delete_layers(model, deleted)
    return [score(model, tokenizer, task, n) for task in tqdm(tasks.TASKS, leave=False)]


def show(scores: list[Score]) -> None:
    """Print a table."""
    print(f"{'task':<10} {'n':>5} {'exact match':>12}   95 % interval")
    for result in scores:
        low, high = result.interval
        print(
            f"{result.task:<10} {result.asked:>5} {result.share:>12.1%}   {low:.1%} to {high:.1%}"
        )


def compare(folder: Path, n: int, sets: list[str], out: Path) -> None:
    """Score with each set of layers deleted in turn; write `out`.csv and `out`.png."""
    from vllm_adaskip.lab.testbed import picture

    with out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["deleted", *tasks.TASKS])
        for deleted in tqdm(["", *sets], desc="deleted"):
            scores = score_all(folder, n, numbers(deleted))
            writer.writerow([deleted or "none", *(f"{result.share:.3f}" for result in scores)])
    picture.deleted_layers(out.with_suffix(".csv"), out.with_suffix(".png"))


def numbers(text: str) -> list[int]:
    """Read layer numbers such as 5,6."""
    return [int(layer) for layer in text.split(",") if layer]


def main() -> None:
    """Read the command line and score."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="folder of the model")
    parser.add_argument("--n", type=int, default=200, help="questions per task")
    parser.add_argument(
        "--delete-layers", default="", help="for instance 5,6; the first layer is 0"
    )
    parser.add_argument("--json", type=Path, help="write the scores to this file too")
    parser.add_argument("--compare", type=Path, metavar="OUT", help="write OUT.csv and OUT.png")
    parser.add_argument(
        "--sets", help="sets of layers to compare, as 5;5,6;5,6,7 (each single layer if not given)"
    )
    options = parser.parse_args()
    if options.compare:
        layers = AutoConfig.from_pretrained(options.model).num_hidden_layers
        sets = options.sets.split(";") if options.sets else [str(k) for k in range(layers)]
        compare(options.model, options.n, sets, options.compare)
        return
    scores = score_all(options.model, options.n, numbers(options.delete_layers))
    show(scores)
    if options.json:
        table = [asdict(s) | {"exact_match": s.share, "interval": s.interval} for s in scores]
        options.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
