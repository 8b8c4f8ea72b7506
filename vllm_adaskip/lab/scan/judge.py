# SPDX-License-Identifier: Apache-2.0
"""How far a model under a plan still says what the whole model says, by teacher forcing.

The prompts run once, at full depth, and their K/V are kept. What is read under each plan is the
whole model's own answers, each token of which follows the plan, from the first layer on that
the plan damages.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from vllm_adaskip.classifiers.plan import SkipPlan
from vllm_adaskip.lab.evaluation.results import PlanReading, WholeAnswer
from vllm_adaskip.lab.evaluation.sweep import MOST_KEPT, Below, running
from vllm_adaskip.lab.fitting.sub_layers import decoder_layers, visited

How = Literal["search", "held out"]


@dataclass
class Part:
    """Some answers in one batch.

    Attributes:
        ids: ``[rows, tokens]`` the answers' tokens that are fed, padded on the right.
        real: ``[rows, tokens]`` which are no padding.
        mask: ``[rows, prompt + tokens]`` the same with the prompts, padded on the left.
        prompt: tokens of the prompts, with padding.
        cache: K/V of the prompts.
        whole: logits of the whole model, ``[real tokens, vocabulary]``.
        streams: what each layer of the whole model returned.

    """

    ids: Tensor
    real: Tensor
    mask: Tensor
    prompt: int
    cache: Any = None
    whole: Tensor = field(default_factory=lambda: torch.zeros(0))
    streams: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, answers: Sequence[WholeAnswer], device: torch.device) -> tuple[Part, Tensor]:
        """Return the part and its prompts ``[rows, prompt]``.

        The last token of an answer is not fed back, and the first comes from the prompt.
        """
        prompt = max(len(one.prompt) for one in answers)
        width = max(len(one.answer) for one in answers) - 1
        prompts = torch.zeros(len(answers), prompt, dtype=torch.long)
        ids = torch.zeros(len(answers), width, dtype=torch.long)
        mask = torch.zeros(len(answers), prompt + width, dtype=torch.long)
        for row, one in enumerate(answers):
            prompts[row, -len(one.prompt) :] = torch.tensor(one.prompt)
            ids[row, : len(one.answer) - 1] = torch.tensor(one.answer[:-1])
            mask[row, prompt - len(one.prompt) : prompt + len(one.answer) - 1] = 1
        ids, mask = ids.to(device), mask.to(device)
        return cls(ids, mask[:, prompt:].bool(), mask, prompt), prompts.to(device)


class Judge:
    """A transformers model and answers of its own, on which it is compared with itself.

    Args:
        model: of transformers.
        answers: of two tokens or more.
        how: which half they are.
        batch: how many are read at once.

    """

    def __init__(
        self, model: Any, answers: Sequence[WholeAnswer], how: How, batch: int = 16
    ) -> None:
        self.num_layers = len(decoder_layers(model))
        self._model, self._how = model, how
        self._wanted = inspect.signature(model.forward).parameters
        width = model.config.get_text_config().hidden_size * 4
        kept = sum(len(one.answer) for one in answers) * width * self.num_layers
        self._keeps = hasattr(model.model, "layers") and kept <= MOST_KEPT
        ordered = sorted(range(len(answers)), key=lambda place: len(answers[place].prompt))
        self._places = [ordered[start : start + batch] for start in range(0, len(ordered), batch)]
        self._parts = [self._prepared([answers[place] for place in own]) for own in self._places]

    @torch.inference_mode()
    def read(self, plan: SkipPlan) -> PlanReading:
        """Return agreement, surprise and loss of the answers under a plan."""
        found: dict[int, tuple[float, float]] = {}
        losses = []
        for places, part in zip(self._places, self._parts, strict=True):
            logits = self._under(part, plan)
            top, best = logits.argmax(-1), part.whole.argmax(-1)
            gaps = part.whole.max(-1).values - part.whole.gather(1, top[:, None])[:, 0]
            losses.append(functional.cross_entropy(logits, best, reduction="none"))
            rows = part.real.sum(1).tolist()
            for place, gap in zip(places, torch.split(gaps.double(), rows), strict=True):
                found[place] = (gap <= 0).double().mean().item(), gap.mean().item()
        ordered = [found[place] for place in sorted(found)]
        return PlanReading(
            how=self._how,
            skip=plan.entries(),
            agreement=[one[0] for one in ordered],
            surprise=[one[1] for one in ordered],
            loss=torch.cat(losses).double().mean().item(),
        )

    @torch.inference_mode()
    def _prepared(self, answers: Sequence[WholeAnswer]) -> Part:
        """Run the prompts, then the whole model on the answers."""
        part, prompts = Part.of(answers, self._model.device)
        part.cache = self._forward(prompts, part.mask[:, : part.prompt], None, 1).past_key_values
        with self._streams_of(part):
            part.whole = self._under(part, SkipPlan(self.num_layers))
        return part

    @contextmanager
    def _streams_of(self, part: Part) -> Iterator[None]:
        """Keep what each layer returns, where that is not too much."""
        layers = decoder_layers(self._model) if self._keeps else ()
        hooks = [
            one.register_forward_hook(lambda _, __, made: part.streams.append(made))
            for one in layers
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _under(self, part: Part, plan: SkipPlan) -> Tensor:
        """Return logits ``[real tokens, vocabulary]`` of the answers under a plan."""
        left_out = plan.mask()

        def visit(sub_layer: int, before: Tensor, update: Tensor) -> Tensor:
            return torch.zeros_like(update) if left_out[sub_layer] else update

        with ExitStack() as stack:
            stack.enter_context(visited(self._model, visit))
            first = int(left_out.argmax()) // 2
            if part.streams and not plan.is_dense and first:
                below = Below()
                below.layers, below.made[below.batch] = first, part.streams[first - 1]
                rest = range(first, self.num_layers)
                stack.enter_context(running(self._model, below, rest))
            output = self._forward(part.ids, part.mask, _copied(part.cache), 0)
        logits: Tensor = output.logits[part.real].float()
        return logits

    def _forward(self, ids: Tensor, mask: Tensor, cache: Any, logits: int) -> Any:
        """Run the model on the last tokens of what the mask spans; ``logits`` 0: of all."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions,
            "past_key_values": cache,
            "use_cache": True,
            "logits_to_keep": logits,
        }
        return self._model(**{name: one for name, one in inputs.items() if name in self._wanted})


def _copied(cache: Any) -> Any:
    """Return a cache to which tokens may be added; the tensors that both hold are never written."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied
