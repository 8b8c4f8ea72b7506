# SPDX-License-Identifier: Apache-2.0
"""Trains a copy of a model's first layers to say what the whole model says.

As in LayerSkip's self-speculation (arXiv 2404.16710) the first layers draft and read the model's
own K and V; but the copy is trained and the model stays as it is, so that no answer changes. A
token is fed as it will be in an engine: a block of drafts reads the model's K and V of all tokens
before it, and the copy's own within it.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from vllm_adaskip.classifiers.profile import fingerprint
from vllm_adaskip.engine.draft_weights import TENSORS, VOCABULARY, DraftProfile
from vllm_adaskip.lab.fitting.samples import Batch, Sample, batch_of, before_answers
from vllm_adaskip.lab.fitting.training import of_near_length

#: Drafts in a block, in training.
BLOCK = 4
#: What a copy shares with the model, so that it can read its cache.
_FROZEN = ("k_proj", "v_proj")


@dataclass(frozen=True)
class Settings:
    """How a draft is trained.

    Attributes:
        exit: first layers that are copied.
        vocabulary: most frequent tokens of the answers that drafts may have; 0: all.
        minutes: of training.
        batch: samples of an update.
        rate: highest learning rate.
        seed: of the order.

    """

    exit: int
    vocabulary: int = 8192
    minutes: float = 30.0
    batch: int = 16
    rate: float = 5e-4
    seed: int = 0


class Draft(nn.Module):
    """The copy, beside the model.

    Attributes:
        exit: layers that are copied.
        vocabulary: ``[tokens]`` ids of the tokens that it may draft; None: all.

    """

    def __init__(self, model: Any, exit: int, vocabulary: Tensor | None) -> None:
        """Copy the first layers of a transformers model whose layers are laid out as Llama's."""
        super().__init__()
        self._first = (_with_layers(model, model.model.layers[:exit]),)  # not a part of this
        self._model = (model,)
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(deepcopy(layer) for layer in model.model.layers[:exit])
        self.model.norm = deepcopy(model.model.norm)
        self.exit, self.vocabulary = exit, vocabulary
        head = model.lm_head.weight.detach()
        self._head = (head if vocabulary is None else head[vocabulary].clone(),)
        self._copy = (_with_layers(model, self.model.layers, self.model.norm),)
        for name, weight in self.named_parameters():
            weight.requires_grad = not any(part in name for part in _FROZEN)

    def forward(self, batch: Batch, offset: int, block: int = BLOCK) -> Tensor:
        """Return logits ``[rows, answer + 1, vocabulary]`` of the tokens behind the last ones.

        The copy runs for the tokens that answers follow, the model's layers for all.

        Args:
            batch: padded on the left.
            offset: of the blocks.
            block: drafts in each.

        """
        with torch.no_grad():
            cache = self._first[0](
                input_ids=batch.ids, attention_mask=batch.real.long(),
                position_ids=batch.positions, use_cache=True,
            ).past_key_values  # fmt: skip
        first = before_answers(batch)
        hidden = self._copy[0](
            input_ids=batch.ids[:, first:],
            attention_mask=blocks(batch.real, first, offset, block),
            position_ids=batch.positions[:, first:], past_key_values=cache, use_cache=True,
        ).last_hidden_state  # fmt: skip
        return functional.linear(hidden, self._head[0])

    def trained(self) -> dict[str, Tensor]:
        """Return what was trained, by the names of the model's checkpoint."""
        return {name: one.detach() for name, one in self.named_parameters() if one.requires_grad}


def saved(
    draft: Draft, folder: Path, model: str, config: Mapping[str, Any], metrics: Mapping[str, Any]
) -> None:
    """Write the folder that option ``draft.profile`` names.

    Args:
        draft: trained.
        folder: of the two files.
        model: its name.
        config: of the model.
        metrics: figures, to read.

    """
    tensors = {name: one.bfloat16().contiguous() for name, one in draft.trained().items()}
    if draft.vocabulary is not None:
        tensors[VOCABULARY] = draft.vocabulary
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / TENSORS)
    DraftProfile(
        exit=draft.exit,
        model=model,
        fingerprint=fingerprint(config),
        metrics=dict(metrics),
    ).save(folder)


def _with_layers(model: Any, layers: Any, norm: Any = None) -> Any:
    """Return a model's decoder with other layers; everything else is the model's own."""
    own = object.__new__(type(model.model))
    own.__dict__.update(model.model.__dict__, _modules={**model.model._modules})
    own._modules["layers"] = nn.ModuleList(layers)
    if norm is not None:
        own._modules["norm"] = norm
    own.__dict__["config"] = deepcopy(model.model.config)
    own.config.num_hidden_layers = len(layers)
    if getattr(own.config, "layer_types", None):
        own.config.layer_types = own.config.layer_types[: len(layers)]
    return own


def blocks(real: Tensor, first: int, offset: int, block: int) -> Tensor:
    """Return what each token from ``first`` on sees, ``[rows, 1, last, tokens + last]`` bool.

    First come K and V of the model, of which it sees those before its block; then the copy's own,
    of which it sees those of its block up to itself.
    """
    at = torch.arange(real.shape[1])
    last = at[first:]
    start = (last - (last + offset) % block).clamp(min=first)
    before = at[None] < start[:, None]
    own = (last[None] >= start[:, None]) & (last[None] <= last[:, None])
    sees = torch.cat([before, own], dim=1)[None, None].to(real.device)
    sees = sees & torch.cat([real, real[:, first:]], dim=1)[:, None, None]
    # Padding sees itself, as a row of scores must not be empty.
    itself = torch.cat([torch.zeros(len(last), len(at)), torch.eye(len(last))], dim=1).bool()
    return sees | (itself.to(real.device) & ~real[:, None, first:, None])


def frequent(samples: Sequence[Sample], size: int, all_tokens: int) -> Tensor | None:
    """Return the ids of the tokens that answers have most often, in order; None: all."""
    if not 0 < size < all_tokens:
        return None
    counted = Counter(token for one in samples for token in one.ids[-one.answer :])
    found = [token for token, _ in counted.most_common(size)]
    seen = set(found)
    found += [token for token in range(all_tokens) if token not in seen][: size - len(found)]
    return torch.tensor(sorted(found))


def labels_of(batch: Batch, vocabulary: Tensor | None) -> Tensor:
    """Return the place in the vocabulary of the token behind each of the last ones.

    It is -100 where that is no answer's, or outside of the vocabulary.
    """
    labels = wanted(batch)
    if vocabulary is None:
        return labels
    place = torch.searchsorted(vocabulary, labels.clamp(min=0))
    place = place.clamp(max=len(vocabulary) - 1)
    return torch.where(vocabulary[place] == labels, place, -100)


def wanted(batch: Batch) -> Tensor:
    """Return the token behind each of the last ones, of which `Draft` returns logits; or -100."""
    return functional.pad(batch.labels, (0, 1), value=-100)[:, before_answers(batch) :]


def accepted(draft: Draft, samples: Sequence[Sample], device: torch.device) -> list[float]:
    """Return the share of answers' tokens that a draft has right, by place in its block."""
    right, seen = torch.zeros(2, BLOCK)
    with torch.inference_mode():
        for start in range(0, len(samples), 16):
            batch = batch_of(samples[start : start + 16], device)
            labels, first = wanted(batch), before_answers(batch)
            for offset in range(BLOCK):
                with torch.autocast(device.type, torch.bfloat16):
                    picked = draft(batch, offset).argmax(-1)
                if draft.vocabulary is not None:
                    picked = draft.vocabulary[picked]
                place = (torch.arange(labels.shape[1]) + first + offset) % BLOCK
                for one in range(BLOCK):
                    mask = (labels != -100) & (place == one)
                    right[one] += (picked == labels)[mask].sum()
                    seen[one] += mask.sum()
    return [float(share) for share in right / seen]


def train(
    draft: Draft,
    samples: Sequence[Sample],
    settings: Settings,
    device: torch.device,
    say: Callable[[float, float], None],
) -> list[float]:
    """Train for the minutes that are set, or until Ctrl-C; return the loss of each update.

    ``say`` is told the share of the time that is over, and the loss.
    """
    weights = [one for one in draft.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=settings.rate, betas=(0.9, 0.95), weight_decay=0.01)
    stream = of_near_length(samples, settings.batch, settings.seed)
    rng = random.Random(settings.seed)
    start, losses = time.monotonic(), list[float]()
    with suppress(KeyboardInterrupt):
        while (over := (time.monotonic() - start) / (60 * settings.minutes)) < 1:
            for group in optimizer.param_groups:
                group["lr"] = settings.rate * min(1.0, (len(losses) + 1) / 20) * (1 - over)
            batch = batch_of(next(stream), device)
            with torch.autocast(device.type, torch.bfloat16):
                logits = draft(batch, rng.randrange(BLOCK))
            labels = labels_of(batch, draft.vocabulary)
            loss = functional.cross_entropy(logits[labels != -100].float(), labels[labels != -100])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            losses.append(loss.item())
            say(over, losses[-1])
    return losses
