# SPDX-License-Identifier: Apache-2.0
"""Train the model.

python -m vllm_adaskip.lab.testbed.train --out DIR --seed 0 --minutes 62
"""

import argparse
import csv
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaForCausalLM

from vllm_adaskip.lab.precision import in_16_bits
from vllm_adaskip.lab.testbed import batches, course, network, picture, tokenizer

SEGMENT_LENGTH = 96
#: Of so many layers one leaves in a step, beside the last.
EXITS_EVERY = 3


@dataclass
class Options:
    """What a run is started with."""

    out: Path
    seed: int = 0
    minutes: float = 62.0
    steps: int | None = None  # end after so many steps instead of so many minutes
    rows: int = 64
    layers: int = 12
    hidden: int = 192
    rate: float = 5e-3
    dropout: float = 0.2
    every: float = 3.0  # minutes between checkpoints
    questions: int = 100  # per task and checkpoint
    compiled: bool = True
    resume: bool = False
    start: Path | None = None  # a trained model to go on from, at full length of the questions
    exits: float = 0.0  # LayerSkip's scale of the early exits' loss; 0: the last layer's alone


@dataclass
class Record:
    """What happened so far; kept in the checkpoint."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: list[tuple[int, int, float, float]] = field(default_factory=list)
    matches: list[dict[str, float]] = field(default_factory=list)
    best: float = -1.0


class Trainer:
    """One training run."""

    def __init__(self, options: Options) -> None:
        self.options = options
        torch.manual_seed(options.seed)
        self.tokenizer = tokenizer.build()
        if options.start is None:
            self.model = network.create(self.tokenizer, options.layers, options.hidden)
        else:
            self.model = LlamaForCausalLM.from_pretrained(options.start, dtype=torch.float32)
        self.optimizers = self._optimizers()
        self.record = Record()
        self.course = batches.Course()
        self.checkpoint = options.out / "checkpoint.pt"
        if options.resume:
            self._load()
        self.generator = torch.Generator().manual_seed(options.seed * 1_000_003 + self.record.steps)
        self.loss: Callable[..., Tensor] = (
            torch.compile(self._loss) if options.compiled else self._loss
        )

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """Return Muon for new weight matrices, and AdamW for the rest and for trained models."""
        trained = self.options.start is not None
        inner = [p for p in self.model.model.layers.parameters() if p.ndim == 2 and not trained]
        chosen = {id(p) for p in inner}
        others = [p for p in self.model.parameters() if id(p) not in chosen]
        rate = self.options.rate
        adam = torch.optim.AdamW(others, rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        if trained:
            return [adam]
        muon = torch.optim.Muon(inner, rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        return [muon, adam]

    @property
    def progress(self) -> float:
        """From 0 to 1. By the clock, so that a shared machine cannot cut the schedule short."""
        if self.options.steps is not None:
            return self.record.steps / self.options.steps
        return self.record.seconds / (self.options.minutes * 60)

    def _loss(
        self,
        ids: Tensor,
        positions: Tensor,
        segments: Tensor,
        gates: Tensor,
        labels: Tensor,
        weights: Tensor,
    ) -> Tensor:
        """Return the loss; without early exits ``weights`` of the layers are not looked at."""
        found = network.streams(self.model, ids, positions, segments, gates)
        leaving = found if self.options.exits else found[-1:]
        logits = [network.head(self.model, each) for each in leaving]
        losses = torch.stack([network.answer_loss(each, labels) for each in logits])
        return losses @ weights[-len(losses) :]

    def step(self, batch: batches.Batch) -> float:
        """One update; returns the loss before it."""
        layers = len(self.model.model.layers)
        drop = network.drop_probabilities(layers, self.options.dropout, self.progress)
        gates = network.sample_gates(drop, batch.segments, self.generator)
        weights = network.exit_weights(
            len(gates), self.options.exits, EXITS_EVERY, self.record.steps
        )
        with in_16_bits(self.model.device):
            loss = self.loss(
                batch.ids, batch.positions, batch.segments, gates, batch.labels, weights
            )
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.options.rate * course.rate(self.progress)
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    def plan(self) -> None:
        """Set what the data worker makes next."""
        learned = self.record.matches[-1] if self.record.matches else {}
        # What goes on from a trained model begins where short questions and exercises are over.
        at = self.progress if self.options.start is None else 1.0
        self.course.set(course.shares(at, learned), course.level(at))

    def check(self, last: bool = False) -> None:
        """Measure on the tune split, then save.

        The best model so far is written as a model, and so is the last one: the differences at the
        end are within the check's noise, and its learning rate has come down. The rest is saved to
        resume from.
        """
        matches = course.exact_matches(
            self.model, self.tokenizer, self.options.seed, self.options.questions
        )
        self.record.matches.append({"step": self.record.steps, **matches})
        mean = sum(matches.values()) / len(matches)
        tqdm.write(f"{self.record.tokens / 1e6:.1f}M tokens, mean {mean:.3f}: " + ", ".join(
            f"{task} {match:.2f}" for task, match in matches.items()))  # fmt: skip
        if last or mean >= self.record.best:
            self.record.best = max(mean, self.record.best)
            network.save(self.model, self.tokenizer, self.options.out)
        self._save()

    def _save(self) -> None:
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "record": asdict(self.record),
        }
        unfinished = self.checkpoint.with_suffix(".part")
        torch.save(state, unfinished)
        os.replace(unfinished, self.checkpoint)

    def _load(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.record = Record(**state["record"])

    def run(self) -> Record:
        """Train to the end of the schedule."""
        options, record = self.options, self.record
        options.out.mkdir(parents=True, exist_ok=True)
        self.plan()
        # Another seed after resuming, so that no sample is seen again.
        stream = batches.TrainingStream(
            self.tokenizer,
            self.course,
            f"{options.seed}/{record.steps}",
            options.rows,
            SEGMENT_LENGTH,
        )
        bar = tqdm(total=100.0, unit="%", mininterval=5)
        checked, last = record.seconds, time.monotonic()
        for batch in batches.loader(stream, background=options.compiled):
            loss = self.step(batch)
            record.steps += 1
            record.tokens += int((batch.segments >= 0).sum())
            now = time.monotonic()
            record.seconds, last = record.seconds + now - last, now
            if record.steps % 20 == 0 or options.steps is not None:
                record.loss.append(
                    (record.steps, record.tokens, round(record.seconds, 1), round(loss, 4))
                )
                bar.set_postfix(loss=f"{loss:.3f}", tokens=f"{record.tokens / 1e6:.1f}M")
                bar.update(min(100.0, self.progress * 100) - bar.n)
                self.plan()
            if self.progress >= 1:
                break
            if record.seconds - checked > options.every * 60:
                self.check()
                checked = record.seconds
        self.check(last=True)
        return record

    def write_record(self) -> None:
        """Write the record for people, the loss curve and its picture."""
        record, out = self.record, self.options.out
        with (out / "loss.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([("step", "tokens", "seconds", "loss"), *record.loss])
        summary = {
            "seed": self.options.seed,
            "minutes": round(record.seconds / 60, 1),
            "steps": record.steps,
            "tokens": record.tokens,
            "parameters": self.model.num_parameters(),
            "layer_dropout": self.options.dropout,
            "early_exit_scale": self.options.exits,
            "rate": self.options.rate,
            "torch": torch.__version__,
            "tune_exact_match": record.matches,
        }
        (out / "training.json").write_text(json.dumps(summary, indent=1) + "\n")
        picture.loss_curve(out / "loss.csv", out / "loss.png")


def parse() -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for model and records")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=62.0, help="length of the schedule")
    parser.add_argument("--steps", type=int, help="length of the schedule in steps instead")
    parser.add_argument(
        "--rows", type=int, default=64, help=f"rows of {SEGMENT_LENGTH} tokens per step"
    )
    parser.add_argument("--rate", type=float, default=5e-3, help="highest learning rate")
    parser.add_argument("--dropout", type=float, default=0.2, help="p_max of the layer dropout")
    parser.add_argument("--start", type=Path, help="folder of a trained model to go on from")
    parser.add_argument("--exits", type=float, default=0.0, help="scale of the early exits' loss")
    parser.add_argument("--every", type=float, default=3.0, help="minutes between checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    return Options(**vars(parser.parse_args()))


def main() -> None:
    """Train, then write the record."""
    trainer = Trainer(parse())
    trainer.run()
    trainer.write_record()


if __name__ == "__main__":
    main()
