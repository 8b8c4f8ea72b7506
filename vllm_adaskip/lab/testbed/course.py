# SPDX-License-Identifier: Apache-2.0
"""What is trained when, and a quick check of what is learned."""

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from vllm_adaskip.lab.precision import in_16_bits
from vllm_adaskip.lab.testbed import network, tasks
from vllm_adaskip.lab.testbed.batches import Packer

# How much of the training a task gets while it is not learned.
WEIGHTS = {
    "sentiment": 0.5,
    "topic": 0.4,
    "fact": 1.6,
    "hop": 1.8,
    "translate": 1.4,
    "key": 1.4,
    "sum": 1.2,
    "column": 2.0,
    "steps": 1.4,
}
# A learned task still gets this much of it, so that it is not forgotten.
KEPT = 0.15
WARM_UP, DECAY_FROM = 0.02, 0.5


def rate(progress: float) -> float:
    """Factor on the learning rate: short warm-up, flat half, straight down to zero."""
    return min(1.0, progress / WARM_UP + 0.01, max(1 - progress, 0.0) / (1 - DECAY_FROM))


def level(progress: float) -> float:
    """Lengths grow over the first quarter."""
    return min(1.0, progress / 0.25)


def shares(progress: float, learned: dict[str, float]) -> dict[str, float]:
    """Shares of tasks and exercises; `learned` is each task's exact match on the tune split."""
    result = {task: WEIGHTS[task] * (KEPT + 1 - learned.get(task, 0.0)) for task in tasks.TASKS}
    # Copying and word-for-word translation come first; other tasks build on them.
    fading = max(0.0, 1 - progress / 0.2)
    total = sum(result.values())
    result["copy"] = total * (0.5 * fading + 0.02)
    result["gloss"] = total * 0.25 * fading
    return result


@torch.no_grad()
def exact_match(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, task: str, seed: int, n: int
) -> float:
    """Share of `n` questions of the tune split answered right."""
    packer, stream = Packer(tokenizer, 96), iter(tasks.samples(task, "tune", seed, n))
    asked = right = 0
    while True:
        batch = packer.batch(stream, rows=16)
        answers = batch.labels >= 0
        if not answers.any():
            return right / asked
        gates = torch.ones(len(model.model.layers), *batch.ids.shape)
        with in_16_bits(batch.ids.device):
            logits = network.forward(model, batch.ids, batch.positions, batch.segments, gates)
        wrong = (logits.argmax(-1) != batch.labels) & answers
        row = torch.arange(len(batch.ids))[:, None] * batch.ids.shape[1]
        sample = row + batch.segments
        asked_here = torch.unique(sample[answers])
        asked += len(asked_here)
        right += len(asked_here) - len(torch.unique(sample[wrong]))


def exact_matches(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, n: int
) -> dict[str, float]:
    """Check every task."""
    return {task: exact_match(model, tokenizer, task, seed, n) for task in tasks.TASKS}
