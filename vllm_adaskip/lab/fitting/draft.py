# SPDX-License-Identifier: Apache-2.0
"""Trains a copy of a model's first layers to say what the whole model says.

As in LayerSkip's self-speculation (arXiv 2404.16710) the first layers draft and read the model's
own K and V; but the copy is trained and the model stays as it is, so that no answer changes. As in
EAGLE (arXiv 2401.15077) it hears what the whole model made of the token before, or what it made of
it itself where that was a draft too. In training all tokens are fed as they will be in an engine:
once as a first draft, then as a second one, and so on.
"""

from __future__ import annotations

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
from vllm_adaskip.lab.fitting.samples import (
    IGNORED,
    Batch,
    Sample,
    batch_of,
    batches_of,
    before_answers,
)
from vllm_adaskip.lab.fitting.training import of_near_length
from vllm_adaskip.lab.precision import in_16_bits

#: Drafts one after the other, in training; and how much each counts less than the one before.
PLACES, FADING = 3, 0.7
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


@dataclass(frozen=True, kw_only=True)
class Read(Sample):
    """A sample that the whole model has read.

    Attributes:
        states: ``[answer + 1, hidden]`` what its LM head took before each token that is fed, which
            are the prompt's last and the answer's.

    """

    states: Tensor


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
        width = model.lm_head.in_features
        self.hears = nn.Linear(width, width, bias=False, device=model.device, dtype=model.dtype)
        nn.init.zeros_(self.hears.weight)
        self.exit, self.vocabulary = exit, vocabulary
        head = model.lm_head.weight.detach()
        self._head = (head if vocabulary is None else head[vocabulary].clone(),)
        self._copy = (_with_layers(model, self.model.layers, self.model.norm),)
        for name, weight in self.named_parameters():
            weight.requires_grad = not any(part in name for part in _FROZEN)

    def read(self, samples: Sequence[Sample], done: Callable[[int], None]) -> list[Read]:
        """Have the whole model read samples; ``done`` is told of how many."""
        model, found = self._model[0].model, dict[int, Read]()
        with torch.inference_mode(), in_16_bits(self._model[0].device):
            for places, batch in batches_of(samples, 16, self._model[0].device):
                hidden = model(
                    input_ids=batch.ids, attention_mask=batch.real.long(),
                    position_ids=batch.positions, use_cache=False,
                ).last_hidden_state  # fmt: skip
                before = functional.pad(hidden, (0, 0, 1, 0))[:, before_answers(batch) : -1]
                for place, states in zip(places, before.bfloat16().cpu(), strict=True):
                    one = samples[place]
                    own = states[: one.answer + 1].clone()  # which lets the batch go
                    found[place] = Read(**vars(one), states=own)
                done(len(places))
        return [found[place] for place in range(len(samples))]

    def forward(self, batch: Batch, states: Tensor) -> list[Tensor]:
        """Return, by place, logits ``[rows, answer + 1, vocabulary]`` of the tokens behind.

        Args:
            batch: padded on the left.
            states: ``[rows, answer + 1, hidden]``, see `Read`.

        """
        first, found = before_answers(batch), []
        with torch.no_grad():
            cache = self._first[0](
                input_ids=batch.ids, attention_mask=batch.real.long(),
                position_ids=batch.positions, use_cache=True,
            ).past_key_values  # fmt: skip
            embedded = self._model[0].get_input_embeddings()(batch.ids[:, first:])
        for place in range(PLACES):
            hidden = self._copy[0](
                inputs_embeds=embedded + self.hears(states),
                attention_mask=seen(batch.real, first, place),
                position_ids=batch.positions[:, first:], past_key_values=cache, use_cache=True,
            ).last_hidden_state  # fmt: skip
            found.append(functional.linear(hidden, self._head[0]))
            states = functional.pad(hidden, (0, 0, 1, 0))[:, :-1]
        return found

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


def seen(real: Tensor, first: int, place: int) -> Tensor:
    """Return what each token from ``first`` on sees, ``[rows, 1, last, tokens + places * last]``.

    First come K and V of the model, of which it sees those before the drafts that it is the last
    of; then the copy's own, place by place, of which it sees a token each.
    """
    at = torch.arange(real.shape[1], device=real.device)
    last = at[first:, None]
    parts = [real[:, None] & (at[None] < last - place)]
    for back in reversed(range(place + 1)):
        own = (at[None, first:] == last - back) & (real[:, None, first:] | (back == 0))
        parts.append(own)
    return torch.cat(parts, dim=2)[:, None]


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

    It is `IGNORED` where that is no answer's, or outside of the vocabulary.
    """
    labels = wanted(batch)
    if vocabulary is None:
        return labels
    place = torch.searchsorted(vocabulary, labels.clamp(min=0))
    place = place.clamp(max=len(vocabulary) - 1)
    return torch.where(vocabulary[place] == labels, place, IGNORED)


def wanted(batch: Batch) -> Tensor:
    """Return the token behind each last one, of which `Draft` returns logits; or `IGNORED`."""
    return functional.pad(batch.labels, (0, 1), value=IGNORED)[:, before_answers(batch) :]


def accepted(draft: Draft, samples: Sequence[Read], device: torch.device) -> list[float]:
    """Return the share of answers' tokens that a draft has right, by place."""
    right, tried = torch.zeros(2, PLACES)
    with torch.inference_mode(), in_16_bits(device):
        for start in range(0, len(samples), 16):
            batch, states = fed(samples[start : start + 16], device)
            labels = wanted(batch)
            for place, logits in enumerate(draft(batch, states)):
                picked = logits.argmax(-1)
                if draft.vocabulary is not None:
                    picked = draft.vocabulary[picked]
                mask = (labels != IGNORED)[:, place:]
                right[place] += (picked == labels)[:, place:][mask].sum()
                tried[place] += mask.sum()
    return [float(share) for share in right / tried.clamp(min=1)]


def fed(samples: Sequence[Read], device: torch.device) -> tuple[Batch, Tensor]:
    """Return what `Draft` takes."""
    batch = batch_of(samples, device)
    states = nn.utils.rnn.pad_sequence([one.states for one in samples], batch_first=True)
    return batch, states.to(device).float()


def train(
    draft: Draft,
    samples: Sequence[Read],
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
    start, losses = time.monotonic(), list[float]()
    with suppress(KeyboardInterrupt):
        while (over := (time.monotonic() - start) / (60 * settings.minutes)) < 1:
            for group in optimizer.param_groups:
                group["lr"] = settings.rate * min(1.0, (len(losses) + 1) / 20) * (1 - over)
            batch, states = fed(next(stream), device)
            with in_16_bits(device):
                found = draft(batch, states)
            labels = labels_of(batch, draft.vocabulary)
            loss = torch.stack([
                FADING**place * _mean_loss(logits[:, place:], labels[:, place:])
                for place, logits in enumerate(found)
            ])  # fmt: skip
            optimizer.zero_grad()
            torch.autograd.backward(loss.sum())
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            losses.append(loss[0].item())
            say(over, losses[-1])
    return losses


def _mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy; 0 where there are no labels."""
    summed = functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return summed / (labels != IGNORED).sum().clamp(min=1)
