# SPDX-License-Identifier: Apache-2.0
"""Learned skip controllers, as in "Dynamic layer selection" (arXiv 2410.20022), for a study.

A controller stands before a decoder layer and says for a token whether the layer's update is
added to the residual stream. Prompts run at full depth; only answer tokens skip. As in the
paper's code a layer always executes, whatever is decided, and its keys and values come from the
stream as it is, updated by earlier layers or not. So this is about choice and saves no time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vllm_adaskip.lab.testbed.batches import IGNORED
from vllm_adaskip.lab.testbed.network import answer_loss
from vllm_adaskip.lab.testbed.tasks import Sample

#: A layer's gate for each answer token ([batch, answer]), from its index and the stream before it.
Gate = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Questions:
    """Prompts padded on the left and answers on the right, so all answers begin in one column.

    `answer` is what is fed, `labels` the token that should come next. The answer's first
    token follows the prompt's last one, which skips nothing: `first`.
    """

    prompt: Tensor
    real: Tensor  # which columns of `prompt` are no padding
    first: Tensor
    answer: Tensor
    labels: Tensor


def collate(samples: Sequence[Sample], tokenizer: Any) -> Questions:
    """Make one batch of the bundled model's questions and their right answers."""
    table, end = tokenizer.get_vocab(), tokenizer.eos_token_id
    prompts = [[table[word] for word in sample.prompt.split()] for sample in samples]
    answers = [[table[word] for word in sample.answer.split()] for sample in samples]
    return padded(prompts, [[*ids, end] for ids in answers], end)


def padded(prompts: Sequence[list[int]], answers: Sequence[list[int]], end: int) -> Questions:
    """Make one batch of prompts and answers, each with the token that ends it."""
    width, length = max(map(len, prompts)), max(map(len, answers)) - 1
    prompt = torch.tensor([[end] * (width - len(ids)) + ids for ids in prompts])
    column = torch.arange(width)
    fill = [length + 1 - len(ids) for ids in answers]
    return Questions(
        prompt=prompt,
        real=column >= torch.tensor([[width - len(ids)] for ids in prompts]),
        first=torch.tensor([ids[0] for ids in answers]),
        answer=torch.tensor(
            [ids[:-1] + [end] * more for ids, more in zip(answers, fill, strict=True)]
        ),
        labels=torch.tensor(
            [ids[1:] + [IGNORED] * more for ids, more in zip(answers, fill, strict=True)]
        ),
    )


@dataclass
class Prefix:
    """What the prompts leave behind; to transformers' attention it is a cache that never grows."""

    means: Tensor  # [layers, batch, hidden]: mean over the prompt of the stream before each layer
    first_right: Tensor  # whether the full model gets the answer's first token
    cached: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        """Return the prompt's keys and values with the answer's behind them."""
        keys, values = self.cached[layer]
        return torch.cat((keys, key), dim=2), torch.cat((values, value), dim=2)


@torch.no_grad()
def read_prompts(model: Any, questions: Questions) -> Prefix:
    """Run the prompts at full depth."""
    real = questions.real
    output = model(
        input_ids=questions.prompt,
        attention_mask=real.long(),
        position_ids=(real.long().cumsum(1) - 1).clamp(min=0),
        use_cache=True,
        output_hidden_states=True,
        logits_to_keep=1,
    )
    before = torch.stack(output.hidden_states[:-1])
    means = (before * real[:, :, None]).sum(2) / real.sum(1)[:, None]
    right = output.logits[:, -1].argmax(-1) == questions.first
    return Prefix(means, right, [(one.keys, one.values) for one in output.past_key_values.layers])


def answer(model: Any, questions: Questions, prefix: Prefix, gate: Gate) -> tuple[Tensor, Tensor]:
    """Return the answer tokens' logits, and the gates that were used: [layers, batch, answer]."""
    inner, length = model.model, questions.answer.shape[1]
    x: Tensor = inner.embed_tokens(questions.answer)
    rotary = inner.rotary_emb(x, questions.real.sum(1, keepdim=True) + torch.arange(length))
    causal = torch.ones(length, length, dtype=torch.bool).tril().expand(len(x), -1, -1)
    seen = torch.cat((questions.real[:, None].expand(-1, length, -1), causal), dim=2)[:, None]
    # Added to the scores, which every attention of transformers takes; not all take bools.
    mask = torch.zeros_like(seen, dtype=x.dtype).masked_fill(~seen, torch.finfo(x.dtype).min)
    gates = []
    for index, layer in enumerate(inner.layers):
        keep = gate(index, x)
        ran = layer(x, attention_mask=mask, position_embeddings=rotary, past_key_values=prefix)
        # Not x + keep * (ran - x): this way a gate of 1 or 0 leaves no rounding behind.
        x = keep[:, :, None] * ran + (1 - keep[:, :, None]) * x
        gates.append(keep)
    return model.lm_head(inner.norm(x)), torch.stack(gates)


def hard_gumbel(logits: Tensor) -> Tensor:
    """Draw keep (1) or skip (0); backwards, the soft draw at temperature 1 has the gradient."""
    # Exact in float32 with two outcomes: the drawn one has at least half the soft weight.
    return functional.gumbel_softmax(logits, tau=1.0, hard=True)[..., 0]


class Controllers(nn.Module):
    """One controller for each eligible layer: all but the first and the last, which always run.

    Args:
        layers: of the model.
        hidden: the model's width.
        per_sequence: decide once for all answer tokens, or for each token.
        reads: look at the stream (the token's own, or the prompt's mean), or at nothing: then
            what is learned is one static number for each layer.
        keep: share of the eligible layers kept at the beginning.

    """

    def __init__(
        self, layers: int, hidden: int, *, per_sequence: bool, reads: bool, keep: float
    ) -> None:
        super().__init__()
        self.layers, self.per_sequence, self.reads = layers, per_sequence, reads
        start = torch.tensor([keep, 1 - keep]).log()
        self.bias = nn.Parameter(start.repeat(layers - 2, 1))
        # Without a say at first; then a controller that reads can do all a static one can.
        self.weight = nn.Parameter(torch.zeros(layers - 2, 2, hidden), requires_grad=reads)
        #: Added to "skip" by a decision without noise; set so that a budget is kept exactly.
        self.threshold = 0.0

    def logits(self, index: int, x: Tensor, prefix: Prefix) -> Tensor:
        """Return keep and skip for each answer token, or for the sequence: [batch, tokens, 2]."""
        tokens = 1 if self.per_sequence else x.shape[1]
        bias, weight = self.bias[index - 1], self.weight[index - 1]
        if not self.reads:
            return bias.expand(len(x), tokens, 2)
        states = prefix.means[index][:, None] if self.per_sequence else x.detach()
        # The stream grows with depth; every controller is to see the same scale.
        return functional.linear(functional.layer_norm(states, states.shape[-1:]), weight, bias)

    def gate(self, prefix: Prefix, margins: list[Tensor] | None = None) -> Gate:
        """Return the gates of one pass: with noise in training, else by the larger of the two.

        `margins` collects what the decision rests on, keep minus skip, layer by layer.
        """

        def of(index: int, x: Tensor) -> Tensor:
            if not 0 < index < self.layers - 1:
                return x.new_ones(x.shape[:2])
            logits = self.logits(index, x, prefix)
            margin = logits[..., 0] - logits[..., 1]
            if margins is not None:
                margins.append(margin.expand(x.shape[:2]))
            keep = hard_gumbel(logits) if self.training else (margin > self.threshold).float()
            return keep.expand(x.shape[:2])

        return of


def fixed_gate(kept: set[int]) -> Gate:
    """Keep these layers for every token."""
    return lambda index, x: x.new_full(x.shape[:2], float(index in kept))


def loss_of(
    logits: Tensor, gates: Tensor, labels: Tensor, budget: float, weight: float = 100.0
) -> Tensor:
    """Cross entropy on the answers, and what straying from the budget costs.

    The paper adds the executed share times a constant, and takes the depth that comes of it. A
    square around the budget gives the same depth to all kinds.
    """
    share = gates[:, labels != IGNORED].mean()
    return answer_loss(logits, labels) + weight * (share - budget) ** 2


def train(
    model: Any,
    runs: Sequence[tuple[Controllers, float]],
    draw: Callable[[], Questions],
    steps: int,
    rates: tuple[float, float] = (0.2, 0.001),
) -> None:
    """Train controllers, each for its budget; all see the same questions and share the prompts.

    `rates` are the highest learning rates of what is static and of what reads. The model itself
    must be frozen.
    """
    optimizers = []
    for controllers, _ in runs:
        controllers.train()
        groups = [{"params": [controllers.bias], "lr": rates[0]}]
        if controllers.reads:
            groups.append({"params": [controllers.weight], "lr": rates[1]})
        optimizers.append(torch.optim.Adam(groups))
    falls = [torch.optim.lr_scheduler.LinearLR(one, 1.0, 0.1, steps) for one in optimizers]
    for _ in range(steps):
        questions = draw()
        prefix = read_prompts(model, questions)
        for (controllers, budget), optimizer, fall in zip(runs, optimizers, falls, strict=True):
            logits, gates = answer(model, questions, prefix, controllers.gate(prefix))
            optimizer.zero_grad()
            torch.autograd.backward(loss_of(logits, gates, questions.labels, budget))
            optimizer.step()
            fall.step()


@torch.no_grad()
def calibrate(
    model: Any, questions: Questions, prefix: Prefix, controllers: Controllers, layers: int
) -> float:
    """Set the threshold so that so many layers run on average; give how many ran without it."""
    controllers.eval()
    controllers.threshold = 0.0
    real = questions.labels != IGNORED
    found: list[float] = []
    # What a later controller reads depends on what earlier ones decided, so a few rounds.
    for _ in range(4):
        margins: list[Tensor] = []
        _, gates = answer(model, questions, prefix, controllers.gate(prefix, margins))
        found.append(gates[:, real].sum(0).mean().item())
        ordered = torch.stack(margins)[:, real].flatten().sort(descending=True).values
        kept = round((layers - 2) * int(real.sum()))
        controllers.threshold = ordered[kept - 1 : kept + 1].mean().item()
    return found[0]
