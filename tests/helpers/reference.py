# SPDX-License-Identifier: Apache-2.0
"""What a plan means, as a plain float32 transformers loop at batch size one.

The prompt runs at full depth. Each generated token then runs exactly the sub-layers that
its plan keeps; a skipped attention sub-layer writes no key and no value, or what `kv_fill`
says.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from helpers.decoders import DECODERS, LlamaDecoder, OptDecoder
from vllm_adaskip import SkipPlan
from vllm_adaskip.classifiers import Classifier, Lens, PromptStatistics, Stream


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


@dataclass
class Exit:
    """AdaInfer (arXiv 2403.02181): stop where both features of the prediction are large enough.

    Attributes:
        checks: layers after which to look.
        top_prob: the least probability of the likeliest token, and ``gap`` its least distance to
            the second.
        warm_up: generated tokens that stop nowhere.
        vocabulary: tokens over which probabilities are taken; None: all.
        rule: another rule, called with the features of all check layers so far.
        depths: layers that ran, of each token that was watched.
        margin: smallest distance of a feature to its threshold.

    """

    checks: Sequence[int]
    top_prob: float = 0.0
    gap: float = 0.0
    warm_up: int = 0
    vocabulary: Sequence[int] | None = None
    rule: Callable[[list[tuple[float, float]]], bool] | None = None
    depths: list[int] = field(default_factory=list)
    margin: float = float("inf")

    def settled(self, seen: list[tuple[float, float]]) -> bool:
        if self.rule:
            return self.rule(seen)
        top_prob, gap = seen[-1]
        self.margin = min(self.margin, abs(top_prob - self.top_prob), abs(gap - self.gap))
        return top_prob >= self.top_prob and gap >= self.gap


class ReferenceLens(Lens):
    """The transformers model's own norm and head."""

    def __init__(self, decoder: LlamaDecoder | OptDecoder) -> None:
        self.decoder = decoder

    def check(self, vocabulary: Sequence[int] | None) -> None:
        pass

    def __call__(self, stream: Stream, vocabulary: Sequence[int] | None = None) -> torch.Tensor:
        assert stream.before is not None
        logits = self.decoder.logits(stream.before + stream.update)
        return logits if vocabulary is None else logits[:, list(vocabulary)]


class Fp8Cache(DynamicCache):
    """Keeps keys and values as vLLM's CPU kernels store them in fp8: cut off, not rounded."""

    def __init__(self, form: torch.dtype, **more: Any) -> None:
        super().__init__(**more)
        self._form = form

    def _stored(self, values: torch.Tensor) -> torch.Tensor:
        most = torch.finfo(self._form).max
        near = values.clamp(-most, most).to(self._form).contiguous()
        is_above = near.float().abs() > values.abs()
        return (near.view(torch.uint8) - is_above.to(torch.uint8)).view(self._form).float()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        stored = self._stored(key_states), self._stored(value_states)
        return super().update(*stored, *args, **kwargs)


class Reference:
    """A float32 transformers model and its plan-following greedy loop.

    With a form of fp8 its keys and values are cut off to that. Tokens that leave something out run
    the layers of checkpoint ``taught``, if there is one.
    """

    def __init__(
        self, path: str, kv_form: torch.dtype | None = None, taught: str | None = None
    ) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.num_layers: int = self.model.config.num_hidden_layers
        self.decoder = DECODERS[self.model.config.model_type](self.model)
        self._taught = self.decoder if taught is None else Reference(taught).decoder
        make = DynamicCache if kv_form is None else partial(Fp8Cache, kv_form)
        self._cache = partial(make, config=self.model.config)

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
        exit: Exit | None = None,
        prompt_plan: tuple[Sequence[int | str], int] | None = None,
    ) -> tuple[list[int], float]:
        """Return greedy tokens, and the smallest gap between the two best logits on the way.

        A gap near float32 rounding means that another order of summation may rightly
        choose another token; callers check it. ``then=(n, other)`` follows another plan
        once ``n`` tokens are there. A fresh ``rule`` leaves out more than the plan, and so does an
        ``exit``. ``prompt_plan=(skip, n)``: all tokens of the prompt but the last ``n`` leave that
        out, and their K/V are projected there.
        """
        plan = SkipPlan.parse(skip, self.num_layers)
        cache = self._cache()
        logits = self.read(prompt, cache, *(prompt_plan or ([], len(prompt))))
        tokens, gap = [], float("inf")
        while True:
            best = logits.topk(2).values
            gap = min(gap, (best[0] - best[1]).item())
            tokens.append(int(logits.argmax()))
            if len(tokens) == max_tokens:
                return tokens, gap
            if then and len(tokens) == then[0]:
                plan = SkipPlan.parse(then[1], self.num_layers)
            position = len(prompt) + len(tokens) - 1
            watched = exit if exit and len(tokens) > exit.warm_up else None
            logits = self._step(tokens[-1], position, plan, cache, kv_fill, rule, watched)

    @torch.inference_mode()
    def logprobs(
        self,
        prompt: Sequence[int],
        skip: Sequence[int | str],
        tokens: Sequence[int],
        *,
        kv_fill: str = "none",
        then: tuple[int, Sequence[int | str]] | None = None,
        prompt_plan: tuple[Sequence[int | str], int] | None = None,
    ) -> torch.Tensor:
        """Return log-probabilities ``[tokens, vocabulary]`` where these are the answer's tokens."""
        plan = SkipPlan.parse(skip, self.num_layers)
        cache = self._cache()
        logits = [self.read(prompt, cache, *(prompt_plan or ([], len(prompt))))]
        for count, token in enumerate(tokens[:-1], start=1):
            if then and count == then[0]:
                plan = SkipPlan.parse(then[1], self.num_layers)
            at = len(prompt) + count - 1
            logits.append(self._step(token, at, plan, cache, kv_fill, None, None))
        return torch.stack(logits).log_softmax(dim=-1)

    def read(
        self, prompt: Sequence[int], cache: DynamicCache, skip: Sequence[int | str], tail: int
    ) -> torch.Tensor:
        """Run a prompt, first what leaves something out and then its tail; return its logits."""
        if not skip or tail >= len(prompt):
            logits: torch.Tensor = self.model(torch.tensor([prompt]), past_key_values=cache).logits
            return logits[0, -1]
        cut = len(prompt) - tail
        for start, stop, left_out in ((0, cut, skip), (cut, len(prompt), [])):
            plan = SkipPlan.parse(left_out, self.num_layers)
            decoder = self.decoder if plan.is_dense else self._taught
            hidden, where = decoder.embed(prompt[start:stop], range(start, stop))
            for index in range(self.num_layers):
                if plan.attention >> index & 1:
                    cache.update(*decoder.key_value(index, hidden, where), index)
                else:
                    held = cache.layers[index].keys.shape[-2] if start else 0
                    size = stop - start, stop - start + held
                    mask = torch.full(size, float("-inf")).triu(1 + held)[None, None]
                    hidden = hidden + decoder.attention(index, hidden, where, cache, mask)
                if not plan.mlp >> index & 1:
                    hidden = hidden + decoder.mlp(index, hidden)
        return decoder.logits(hidden)[0, -1]

    @torch.inference_mode()
    def observe(self, prompt: Sequence[int], classifier: Classifier) -> PromptStatistics:
        """Return what a method observes of a prompt, in one piece."""
        values = torch.zeros(len(prompt), classifier.width)
        size = self.model.config.hidden_size
        observe = classifier.observer(size, values.device, ReferenceLens(self.decoder))
        for sub_layer, before, update in self._prompt(prompt):
            observe(sub_layer, before, update, values)
        values = values.double()
        return PromptStatistics(len(prompt), values.mean(dim=0).numpy(), values[-1].numpy())

    @torch.inference_mode()
    def answer(
        self, prompt: Sequence[int], exit: Exit, depth: int | None = None
    ) -> tuple[list[int], float]:
        """Return the token that a prompt comes to which may stop early, at ``depth`` at last."""
        seen: list[tuple[float, float]] = []
        for sub_layer, before, update in self._prompt(prompt):
            layer, is_mlp = divmod(sub_layer, 2)
            if not is_mlp:
                continue
            hidden = (before + update)[-1]
            if layer + 1 == (depth or self.num_layers) or (
                layer in exit.checks and self._is_settled(hidden, seen, exit)
            ):
                exit.depths.append(layer + 1)
                break
        logits = self.decoder.logits(hidden)
        best = logits.topk(2).values
        return [int(logits.argmax())], (best[0] - best[1]).item()

    def _is_settled(
        self, hidden: torch.Tensor, seen: list[tuple[float, float]], exit: Exit
    ) -> bool:
        """Look at ``[hidden_size]`` and tell whether to stop; ``seen`` grows."""
        logits = self.decoder.logits(hidden)
        if exit.vocabulary is not None:
            logits = logits[list(exit.vocabulary)]
        best = [*logits.softmax(-1).sort(descending=True).values[:2].tolist(), 0.0]
        seen.append((best[0], best[0] - best[1]))
        return exit.settled(seen)

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
        exit: Exit | None,
    ) -> torch.Tensor:
        rule = rule or MlpRule(range(0), 0)
        walk = self.walk(token, position, plan, cache, kv_fill, rule, exit)
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
        exit: Exit | None = None,
    ) -> Generator[int, bool, torch.Tensor]:
        """Run a token; asks at each layer whose MLP its plan runs whether to leave it out."""
        rule.start(plan)
        decoder = self.decoder if plan.is_dense else self._taught
        hidden, where = decoder.embed([token], [position])
        depth = self.num_layers - (plan.attention & plan.mlp).bit_count()
        seen: list[tuple[float, float]] = []
        for index in range(self.num_layers):
            if not plan.attention >> index & 1:
                # No mask: one query token sees all that its layer has cached.
                hidden = hidden + decoder.attention(index, hidden, where, cache)
            elif kv_fill == "project":
                cache.update(*decoder.key_value(index, hidden, where), index)
            if not plan.mlp >> index & 1 and not (yield index):
                before = hidden
                hidden = before + decoder.mlp(index, before)
                rule.saw(index, before[0, 0], hidden[0, 0])
            asked = exit and index in exit.checks and index + 1 < depth
            if exit and asked and self._is_settled(hidden[0, 0], seen, exit):
                depth = index + 1
                plan |= SkipPlan.parse(range(depth, self.num_layers), self.num_layers)
        if exit:
            exit.depths.append(depth)
        if kv_fill == "copy":
            self._copy(plan, cache)
        return decoder.logits(hidden)[0, -1]

    def _copy(self, plan: SkipPlan, cache: DynamicCache) -> None:
        ran = [index for index in range(self.num_layers) if not plan.attention >> index & 1]
        for index in set(range(self.num_layers)) - set(ran) if ran else ():
            below = [layer for layer in ran if layer < index]
            source = cache.layers[below[-1] if below else ran[0]]
            cache.update(source.keys[:, :, -1:], source.values[:, :, -1:], index)


def distance(
    prompt: Sequence[int],
    output: Any,
    reference: Reference,
    plan: Sequence[int | str],
    then: tuple[int, Sequence[int | str]] | None = None,
    kv_fill: str = "none",
) -> float:
    """Return how far log-probabilities of an output's candidates are from the loop's, in nats.

    The mean over tokens and candidates; the loop reads the output's own tokens.
    """
    said = reference.logprobs(prompt, plan, output.token_ids, kv_fill=kv_fill, then=then)
    pairs = [
        (said[at, token].item(), one.logprob)
        for at, step in enumerate(output.logprobs)
        for token, one in step.items()
    ]
    return sum(abs(one - other) for one, other in pairs) / len(pairs)
