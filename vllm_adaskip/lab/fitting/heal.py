# SPDX-License-Identifier: Apache-2.0
"""Teaches a model to say under plans what it says whole: distillation from itself (LoRA).

Teacher and student are one model with one copy of its weights; the student has LoRA beside them
(arXiv 2106.09685). In turn the answers' tokens follow the plans that are healed, so that one
adapter serves all of them. Either tokens alone that leave something out have the adapter, and
read K and V of others as the whole model makes them; or all have, and in a share of the rows
nothing is left out. Plans that leave out all layers from one on are LayerSkip's early exits
(arXiv 2404.16710), each met as often as the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional

from vllm_adaskip.classifiers.plan import SkipPlan
from vllm_adaskip.classifiers.profile import Adapted
from vllm_adaskip.engine.prompt_plan import PromptPlan
from vllm_adaskip.lab.fitting.samples import (
    Batch,
    Sample,
    answers_begin,
    batches_of,
    held_back,
)
from vllm_adaskip.lab.fitting.sub_layers import leaving_out, visited
from vllm_adaskip.lab.fitting.training import Curve, Training, adapt, of_near_length, save_adapter

#: In the profile's folder until the fit is done.
CHECKPOINT = "heal.checkpoint"
#: Tokens of which logits are there at once.
_ROWS = 256


class HealSettings(BaseModel):
    """How a model is healed.

    Attributes:
        steps: updates, at rate ``lr``, of ``batch`` answers each.
        rank: of the LoRA weights.
        adapter: whose tokens it is for: ``planned``, those that leave something out; ``merged``,
            all, as a server merges it into the weights.
        whole: share of the rows in which nothing is left out, of an adapter for all.
        seed: of all that is drawn.

    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    steps: int = Field(default=600, ge=1)
    batch: int = Field(default=16, ge=1)
    lr: float = Field(default=1e-3, gt=0)
    rank: int = Field(default=32, ge=1)
    adapter: Adapted = "planned"
    whole: float = Field(default=0.25, ge=0, lt=1)
    seed: int = 0


@dataclass(frozen=True)
class Rung:
    """What a request leaves out: the tokens of its answer, and those of its prompt."""

    plan: SkipPlan
    prompt: PromptPlan | None = None

    @property
    def is_whole(self) -> bool:
        """Whether that is nothing."""
        return self.plan.is_dense and self.prompt is None

    def __str__(self) -> str:
        """Return it in words."""
        if self.is_whole:
            return "nothing left out"
        named = [] if self.plan.is_dense else [str(self.plan)]
        if self.prompt is not None:
            named.append(f"of prompts {self.prompt.plan}, but for {self.prompt.tail} tokens")
        return "; ".join(named)


@dataclass(frozen=True)
class Likeness:
    """How near a model under a plan is to the whole one, over tokens of the whole one's answers.

    Attributes:
        divergence: Kullback-Leibler, of the whole model's next token, in nats a token.
        agreement: share of tokens of which both hold the same likeliest.

    """

    divergence: float
    agreement: float


@dataclass(frozen=True)
class Healed:
    """What came of it.

    Attributes:
        rungs: that were healed, and the one that leaves nothing out, which is the last.
        before: likeness of each, without the adapter.
        after: with it.
        curve: of each step: divergence, and the share of tokens that changed.

    """

    rungs: Sequence[Rung]
    before: Sequence[Likeness]
    after: Sequence[Likeness]
    curve: Curve

    @property
    def worse(self) -> list[Rung]:
        """Return the rungs that the adapter brought no nearer to the whole model."""
        pairs = zip(self.rungs[:-1], self.before, self.after, strict=False)
        return [rung for rung, old, new in pairs if new.divergence >= old.divergence]


def heal(
    model: Any,
    samples: Sequence[Sample],
    rungs: Sequence[Rung],
    settings: HealSettings,
    folder: Path,
    report: Callable[[str, int], None],
) -> Healed:
    """Train an adapter for these rungs, and write it into the folder.

    Args:
        model: of transformers; it is frozen, and gets LoRA beside its weights.
        samples: prompts with the model's own answers, or others.
        rungs: to heal; they leave the same out of prompts.
        settings: of the training.
        folder: of the profile; training goes on from a checkpoint that is there.
        report: is told what is being done, and how many more steps of training are.

    Raises:
        ValueError: hardly any prompt is long enough to leave something out.

    """
    if (prompt := rungs[0].prompt) is not None:
        samples = [one for one in samples if len(one.ids) - one.answer >= prompt.shortest]
        if len(samples) < 2:
            raise ValueError(
                f"{len(samples)} prompts have {prompt.shortest} tokens or more, from which on they "
                "leave something out; use longer ones"
            )
    judging, training = held_back(samples)
    model.requires_grad_(False)
    if model.device.type == "cpu":  # there the backward of the fused one takes twice the time
        model.set_attn_implementation("eager")
    pair = _Pair(model, adapt(model, settings.rank, settings.seed), settings.adapter == "planned")
    every = [*rungs, Rung(SkipPlan(rungs[0].plan.num_layers))]
    spared = 0.0 if pair.is_planned else settings.whole

    def likeness() -> list[Likeness]:
        report("measuring", 0)
        return [_likeness(pair, judging, one, settings.batch) for one in every]

    def loss(batch: Batch) -> Mapping[str, Tensor]:
        return _loss(pair, batch, _in_turn(batch, rungs, every[-1], spared))

    before = likeness()  # with an adapter that changes nothing yet
    weights = {name: one for name, one in model.named_parameters() if one.requires_grad}
    batches = of_near_length(training, settings.batch, settings.seed)
    fitting = Training(
        weights, batches, steps=settings.steps, rate=settings.lr, checkpoint=folder / CHECKPOINT
    )
    curve = fitting.run(loss, model.device, lambda steps: report("healing", steps))
    for weight in weights.values():  # what is judged is what is saved
        weight.data = weight.data.to(model.dtype)
    after = likeness()
    save_adapter(pair.adapted, folder)
    return Healed(every, before, after, curve)


def _in_turn(batch: Batch, ladder: Sequence[Rung], whole: Rung, share: float) -> list[Rung]:
    """Return the rung that each row follows: a share nothing, the others each rung in turn.

    That depends on the batch alone, so that a training which goes on draws no others.
    """
    rows = len(batch.ids)
    spared = round(share * rows)
    first = int(batch.ids.sum()) % rows  # as good as drawn
    places = ((row + first) % rows for row in range(rows))
    return [whole if at < spared else ladder[(at - spared + first) % len(ladder)] for at in places]


def _loss(pair: _Pair, batch: Batch, rungs: Sequence[Rung]) -> Mapping[str, Tensor]:
    """Return the divergence, and the share of tokens that changed, which has no gradient."""
    whole, own = pair.hidden(batch, rungs)
    found = _compared(pair.model.get_output_embeddings(), whole, own)
    tokens = len(own)
    through = (own.float() * found.gradient / tokens).sum()
    value = found.divergence / tokens
    return {
        "divergence": through + (value - through.detach()),  # this value, with that gradient
        "tokens that changed": torch.tensor(1 - found.same / tokens),
    }


@torch.no_grad()
def _likeness(pair: _Pair, samples: Sequence[Sample], rung: Rung, batch: int) -> Likeness:
    divergence, same, tokens = 0.0, 0, 0
    for places, one in batches_of(samples, batch, pair.model.device):
        whole, own = pair.hidden(one, [rung] * len(places))
        found = _compared(pair.model.get_output_embeddings(), whole, own)
        divergence, same = divergence + found.divergence, same + found.same
        tokens += len(own)
    return Likeness(divergence / tokens, same / tokens)


@dataclass(frozen=True)
class _Pair:
    """A model, and itself with the adapter.

    Attributes:
        model: of transformers.
        adapted: peft's model of it.
        is_planned: whether only tokens that leave something out have the adapter.

    """

    model: Any
    adapted: Any
    is_planned: bool

    def hidden(self, batch: Batch, rungs: Sequence[Rung]) -> tuple[Tensor, Tensor]:
        """Return what the head gets, ``[answers' tokens, hidden]``: whole, and of rows on rungs.

        K and V, and hidden states, of columns before the first that differs are the whole one's.
        """
        from transformers import DynamicCache

        cache, width = DynamicCache(), batch.ids.shape[1]
        with torch.no_grad(), self.adapted.disable_adapter():
            whole = self._run(batch, 0, width, cache)
        runs = self._runs(batch, rungs[0])
        known = runs[0][0] if runs else width
        if known:
            cache.crop(known - width)
        else:
            cache = DynamicCache()
        plans, prompts = [one.plan for one in rungs], [one.prompt for one in rungs]
        pieces = [whole[:, :known]]
        for start, end, has_adapter in runs:
            adapter = nullcontext() if has_adapter else self.adapted.disable_adapter()
            with adapter, visited(self.model, leaving_out(batch, plans, prompts, end)):
                pieces.append(self._run(batch, start, end, cache))
        followed = functional.pad(batch.answer[:, 1:], (0, 1))  # by answers' tokens
        return whole[followed], torch.cat(pieces, dim=1)[followed]

    def _runs(self, batch: Batch, rung: Rung) -> list[tuple[int, int, bool]]:
        """Return the columns that differ, run by run, and whether these have the adapter."""
        begin, width = answers_begin(batch), batch.ids.shape[1]
        if not self.is_planned:
            return [(0, width, True)]
        answers = begin, width, not rung.plan.is_dense
        if rung.prompt is None:
            return [] if rung.is_whole else [answers]
        head = max(0, begin - rung.prompt.tail)
        return [
            each for each in ((0, head, True), (head, begin, False), answers) if each[0] < each[1]
        ]

    def _run(self, batch: Batch, start: int, end: int, cache: Any) -> Tensor:
        """Return the hidden states of some columns, behind those that the cache has."""
        hidden: Tensor = self.model.get_decoder()(
            input_ids=batch.ids[:, start:end], attention_mask=batch.real[:, :end].long(),
            position_ids=batch.positions[:, start:end], past_key_values=cache, use_cache=True,
        ).last_hidden_state  # fmt: skip
        return hidden


@dataclass(frozen=True)
class _Compared:
    """Sums over tokens: divergence, how many have the same likeliest.

    The gradient is zero where nothing is trained.
    """

    divergence: float
    same: int
    gradient: Tensor


def _compared(head: Any, whole: Tensor, own: Tensor) -> _Compared:
    """Compare what the head makes of both, in parts: all logits at once would fill the memory."""
    divergence, same, gradient = 0.0, 0, torch.zeros_like(own)
    for start in range(0, len(own), _ROWS):
        rows = slice(start, start + _ROWS)
        part = own[rows].detach().requires_grad_(own.requires_grad)
        with torch.no_grad():
            wanted = functional.log_softmax(head(whole[rows]).float(), -1)
        found = functional.log_softmax(head(part).float(), -1)
        loss = functional.kl_div(found, wanted, reduction="sum", log_target=True)
        if own.requires_grad:
            (gradient[rows],) = torch.autograd.grad(loss, part)
        divergence += loss.item()
        same += int((found.argmax(-1) == wanted.argmax(-1)).sum())
    return _Compared(divergence, same, gradient)
