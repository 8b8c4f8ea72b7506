# SPDX-License-Identifier: Apache-2.0
"""Judges finished outputs in float32: the plain loop of `reference.py`, but teacher-forced.

The plain loop makes one pass for each token. Here the engine's own tokens are given: the
prompt is one pass, or one and its tail another, and all generated tokens are one more pass, under
the plan.
Since the plan is constant this is the same mathematics, at a twentieth of the price.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from helpers.batches import PromptPlan
from helpers.reference import Reference
from tokenizers import Tokenizer
from torture.traffic import Request
from transformers import DynamicCache

from vllm_adaskip import SkipPlan

#: A greedy token may fall this far short of the best logit: another order of summation.
LOGIT_ROUNDING = 1e-4
#: Two orders of summation may give log-probabilities this far apart.
LOGPROB_ROUNDING = 1e-3


class Judge:
    """A float32 transformers model that says what is wrong with an engine's output."""

    def __init__(self, path: str) -> None:
        self._reference = reference = Reference(path)
        self.model, self.num_layers = reference.model, reference.num_layers
        self.eos: int = self.model.config.eos_token_id
        self._tokenizer = Tokenizer.from_file(str(Path(path) / "tokenizer.json"))
        self._prompt: tuple[list[int], PromptPlan | None] = [], None

    def faults(self, request: Request, output: Any) -> Iterator[str]:
        """Say what is wrong with one finished output (vLLM's `CompletionOutput`)."""
        tokens = list(output.token_ids)
        if not tokens:
            yield "no token at all"
            return
        logits = self.logits(request.prompt, request.plan, tokens, request.prompt_plan)
        chosen = torch.tensor(tokens)[:, None]
        if not request.sampled:
            allowed = logits[:, request.only] if request.only else logits
            short = (allowed.amax(-1) - logits.gather(-1, chosen)[:, 0]).tolist()
            for place, gap in enumerate(short):
                if not gap <= LOGIT_ROUNDING:
                    yield f"token {place} is {tokens[place]}, {gap:.4g} short of the best"
                    break  # what follows is judged given this token, and may well be right
        if request.wants_logprobs:
            expected = logits.log_softmax(-1).gather(-1, chosen)[:, 0].tolist()
            for place, (want, got) in enumerate(zip(expected, output.logprobs, strict=True)):
                if not abs(got[tokens[place]].logprob - want) <= LOGPROB_ROUNDING:
                    yield f"logprob {place} is {got[tokens[place]].logprob:.6f}, not {want:.6f}"
                    break
        yield from self._wrong_end(request, tokens, output)

    @torch.inference_mode()
    def logits(
        self,
        prompt: list[int],
        skip: Sequence[int | str],
        tokens: list[int],
        prompt_plan: PromptPlan | None = None,
    ) -> Any:
        """Return ``[len(tokens), vocabulary]``: what each token should be drawn from."""
        if (prompt, prompt_plan) != self._prompt:  # the samples of one request share this pass
            self._prompt = prompt, prompt_plan
            self._cache = DynamicCache(config=self.model.config)
            how = prompt_plan or ([], len(prompt))
            self._first = self._reference.read(prompt, self._cache, *how)[None]
        if len(tokens) == 1:
            return self._first
        plan = SkipPlan.parse(skip, self.num_layers)
        rest = self._pass(tokens[:-1], plan)
        for layer in self._cache.layers:  # back to the prompt alone
            layer.keys = layer.keys[..., : len(prompt), :]
            layer.values = layer.values[..., : len(prompt), :]
        return torch.cat([self._first, rest])

    def _pass(self, tokens: list[int], plan: SkipPlan) -> torch.Tensor:
        """All generated tokens in one pass, each seeing the prompt and those up to itself."""
        decoder, start, count = self.model.model, len(self._prompt[0]), len(tokens)
        hidden = decoder.embed_tokens(torch.tensor([tokens]))
        rotary = decoder.rotary_emb(hidden, torch.arange(start, start + count)[None])
        unseen = torch.ones(count, start + count, dtype=torch.bool).triu(start + 1)
        mask = torch.zeros(unseen.shape).masked_fill(unseen, float("-inf"))[None, None]
        for index, layer in enumerate(decoder.layers):
            if not plan.attention >> index & 1:
                update, _ = layer.self_attn(
                    layer.input_layernorm(hidden),
                    position_embeddings=rotary,
                    attention_mask=mask,
                    past_key_values=self._cache,
                )
                hidden = hidden + update
            if not plan.mlp >> index & 1:
                hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.model.lm_head(decoder.norm(hidden))[0]

    def _wrong_end(self, request: Request, tokens: list[int], output: Any) -> Iterator[str]:
        """Compare where, why and with which text the output ended with what was asked for."""
        ends = (self._end(request, tokens[:count]) for count in range(1, len(tokens) + 1))
        count, end = next(((i, end) for i, end in enumerate(ends, 1) if end), (0, None))
        if count < len(tokens):
            yield f"{len(tokens)} tokens, but it ends after {count} with {end}"
        elif end is None:
            yield f"ended after {len(tokens)} tokens with {output.finish_reason}, too early"
        elif end != (got := (output.finish_reason, output.stop_reason, output.text)):
            yield f"ended with {got}, not {end}"

    def _end(self, request: Request, tokens: list[int]) -> tuple[str, Any, str] | None:
        """Return finish reason, stop reason and text if the last token ends the output."""
        last = tokens[-1]
        if last == self.eos or last in request.stop_token_ids:
            reason = None if last == self.eos else last
            return "stop", reason, self._text(request.prompt, tokens[:-1])
        at_limit = len(tokens) == request.max_tokens
        if not (at_limit or request.stop):
            return None
        text = self._text(request.prompt, tokens)
        if found := [stop for stop in request.stop if stop in text]:
            stop = min(found, key=lambda stop: text.index(stop) + len(stop))
            return "stop", stop, text[: text.index(stop)]
        return ("length", None, text) if at_limit else None

    def _text(self, prompt: list[int], tokens: list[int]) -> str:
        """Decode the way a stream does: the space before the first word counts."""
        whole = self._tokenizer.decode(prompt + tokens, skip_special_tokens=True)
        return whole[len(self._tokenizer.decode(prompt, skip_special_tokens=True)) :]
