# SPDX-License-Identifier: Apache-2.0
"""A quick exact-match check for use during training.

Greedy decoding gives the right answer exactly when each of its tokens is the likeliest one after
the right tokens before it, so one forward pass per question is enough.
"""

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from vllm_adaskip.lab.testbed import network, tasks
from vllm_adaskip.lab.testbed.batches import Packer


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
        with torch.autocast("cpu", torch.bfloat16):
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
