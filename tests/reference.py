# SPDX-License-Identifier: Apache-2.0
"""What a plan means, as a plain float32 transformers loop at batch size one.

The prompt runs at full depth. Each generated token then runs exactly the sub-layers that
its plan keeps; a skipped attention sub-layer writes no key and no value, or what `kv_fill`
says.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from decoders import DECODERS
from transformers import AutoModelForCausalLM, DynamicCache

from vllm_adaskip import SkipPlan
from vllm_adaskip.classifiers import Classifier, PromptStatistics


@dataclass
class MlpRule:
    """FFN-SkipLLM (arXiv 2404.03865) for each generated token, as plainly as it can be written.

    Attributes:
        middle: layers whose MLPs may be left out.
        left_out: of each generated token, the MLPs it left out beyond its plan.
        margin: smallest distance of a similarity to the threshold; near float32 rounding
            another order of summation may rightly decide otherwise.

    """

    middle: range
    threshold: float
    warm_up: int = 0
    max_skip: int = 1_000_000
    left_out: list[list[int]] = field(default_factory=list)
    margin: float = float("inf")

    def start(self, plan: SkipPlan) -> None:
        """Begin with the next generated token."""
        self.is_watching, self.is_skipping = len(self.left_out) >= self.warm_up, False
        self.left = self.max_skip - sum(plan.mlp >> layer & 1 for layer in self.middle)
        self.left_out.append([])

    def leaves_out(self, layer: int) -> bool:
        if not self.is_skipping or layer not in self.middle or not self.left:
            return False
        self.left -= 1
        self.left_out[-1].append(layer)
        return True

    def saw(self, layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
        if self.is_watching and layer in self.middle:
            similarity = torch.cosine_similarity(before, after, dim=-1).item()
            self.margin = min(self.margin, abs(similarity - self.threshold))
            if similarity >= self.threshold:
                self.is_watching, self.is_skipping = False, True


class Reference:
    """A float32 transformers model and its plan-following greedy loop."""

    def __init__(self, path: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.num_layers: int = self.model.config.num_hidden_layers
        self.decoder = DECODERS[self.model.config.model_type](self.model)

    @torch.inference_mode()
    def generate(
        self,
        prompt: Sequence[int],
        skip: Sequence[int | str],
        max_tokens: int,
        *,
        kv_fill: str = "none",
        then: tuple[int, Sequence[int | str]] | None = None,
        rule: MlpRule | None = None,
        factors: Sequence[float] | None = None,
    ) -> tuple[list[int], float]:
        """Give greedy tokens, and the smallest gap between the two best logits on the way.

        A gap near float32 rounding means that another order of summation may rightly
        choose another token; callers check it. ``then=(n, other)`` follows another plan
        once ``n`` tokens are there. A fresh ``rule`` leaves out more than the plan. ``factors``
        (one each) are what sub-layers that the first plan leaves out multiply the stream by.
        """
        plan = SkipPlan.parse(skip, self.num_layers)
        ones = [1.0] * 2 * self.num_layers
        cache = DynamicCache(config=self.model.config)
        logits = self.model(torch.tensor([prompt]), past_key_values=cache).logits[0, -1]
        tokens, gap = [], float("inf")
        while True:
            best = logits.topk(2).values
            gap = min(gap, (best[0] - best[1]).item())
            tokens.append(int(logits.argmax()))
            if len(tokens) == max_tokens:
                return tokens, gap
            if then and len(tokens) == then[0]:
                plan, factors = SkipPlan.parse(then[1], self.num_layers), None
            position = len(prompt) + len(tokens) - 1
            scale = ones if factors is None else factors
            logits = self._step(tokens[-1], position, plan, cache, kv_fill, rule, scale)

    @torch.inference_mode()
    def observe(self, prompt: Sequence[int], classifier: Classifier) -> PromptStatistics:
        """Give what a method observes of a prompt, in one piece."""
        values = torch.zeros(len(prompt), classifier.width)
        observe = classifier.observer(self.model.config.hidden_size, values.device)
        for sub_layer, before, update in self._prompt(prompt):
            observe(sub_layer, before, update, values)
        values = values.double()
        return PromptStatistics(len(prompt), values.mean(dim=0).numpy(), values[-1].numpy())

    def _prompt(self, prompt: Sequence[int]) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Run a prompt in one piece; give sub-layers, the stream before each, and what it adds."""
        hidden, where = self.decoder.embed(prompt, range(len(prompt)))
        mask = torch.full((len(prompt), len(prompt)), float("-inf")).triu(1)[None, None]
        for layer in range(self.num_layers):
            update = self.decoder.attention(layer, hidden, where, mask=mask)
            yield 2 * layer, hidden[0], update[0]
            hidden = hidden + update
            update = self.decoder.mlp(layer, hidden)
            yield 2 * layer + 1, hidden[0], update[0]
            hidden = hidden + update

    def _step(
        self,
        token: int,
        position: int,
        plan: SkipPlan,
        cache: DynamicCache,
        kv_fill: str,
        rule: MlpRule | None,
        factors: Sequence[float],
    ) -> torch.Tensor:
        rule = rule or MlpRule(range(0), 0)
        walk = self.walk(token, position, plan, cache, kv_fill, rule, factors)
        try:
            layer = next(walk)
            while True:
                layer = walk.send(rule.leaves_out(layer))
        except StopIteration as end:
            logits: torch.Tensor = end.value
            return logits

    def walk(
        self,
        token: int,
        position: int,
        plan: SkipPlan,
        cache: DynamicCache,
        kv_fill: str,
        rule: MlpRule,
        factors: Sequence[float],
    ) -> Generator[int, bool, torch.Tensor]:
        """Run a token; asks at each layer whose MLP its plan runs whether to leave it out."""
        rule.start(plan)
        decoder = self.decoder
        hidden, where = decoder.embed([token], [position])
        for index in range(self.num_layers):
            if not plan.attention >> index & 1:
                # No mask: one query token sees all that its layer has cached.
                hidden = hidden + decoder.attention(index, hidden, where, cache)
            else:
                if kv_fill == "project":
                    cache.update(*decoder.key_value(index, hidden, where), index)
                hidden = hidden * float(factors[2 * index])
            if plan.mlp >> index & 1:
                hidden = hidden * float(factors[2 * index + 1])
            elif not (yield index):
                before = hidden
                hidden = before + decoder.mlp(index, before)
                rule.saw(index, before[0, 0], hidden[0, 0])
        if kv_fill == "copy":
            self._copy(plan, cache)
        return decoder.logits(hidden)[0, -1]

    def _copy(self, plan: SkipPlan, cache: DynamicCache) -> None:
        ran = [index for index in range(self.num_layers) if not plan.attention >> index & 1]
        for index in set(range(self.num_layers)) - set(ran) if ran else ():
            below = [layer for layer in ran if layer < index]
            source = cache.layers[below[-1] if below else ran[0]]
            cache.update(source.keys[:, :, -1:], source.values[:, :, -1:], index)
