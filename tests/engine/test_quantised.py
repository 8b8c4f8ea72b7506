# SPDX-License-Identifier: Apache-2.0
"""Quantised checkpoints, made of the bundled model, so that answers mean something.

With nothing skipped all is stock vLLM's, bit for bit. Under plans tokens are those of the float32
loop with the dequantised weights, or where they part the loop's two best logits are nearly equal:
kernels compute in bfloat16, and W8A8 rounds activations as well.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import quantised
from batches import Entries, greedy, sampling
from reference import Reference
from transformers import AutoTokenizer

from vllm_adaskip import bundled_model, engine_args
from vllm_adaskip.lab.testbed.tasks import TASKS, samples

#: Largest distance of the two best logits at which a token may differ.
NEAR = {"W8A8 int8": 1.0, "W4A16 int4": 0.25, "GPTQ int4": 0.25, "AWQ int4": 0.25}
TOKENS = 12
PLANS: list[Entries] = [[5], [5, 6], ["attn:3", "attn:8"], ["mlp:4", "mlp:7"], [], [3, "mlp:9"]]


class Quantised:
    """Engines of one kind, each made once, and the reference."""

    def __init__(self, kind: str, folder: Path, engine: Callable[..., Any]) -> None:
        self.kind = kind
        self.path, dequantised = quantised.write(bundled_model(), folder, kind)
        self.reference = Reference(dequantised)
        self._engine = engine
        self.ours = cache(self._ours)

    def start(self, **options: Any) -> Any:
        return self._engine(self.path, dtype="bfloat16", block_size=32, **options)

    def _ours(self, kv_fill: str) -> Any:
        return self.start(**engine_args(kv_fill=kv_fill))

    def check(self, llm: Any, plans: list[Entries], kv_fill: str) -> int:
        """Run a batch, and return how many sequences equal the reference's to their end."""
        got = greedy(llm, PROMPTS, plans, TOKENS)
        equal = 0
        for prompt, plan, tokens in zip(PROMPTS, plans, got, strict=True):
            want, _ = self.reference.generate(prompt, plan, TOKENS, kv_fill=kv_fill)
            # Behind the end of its answer a model has nothing that it would rather say.
            want = want[: want.index(END) + 1] if END in want else want
            tokens = tokens[: len(want)]
            if tokens == want:
                equal += 1
                continue
            place = next(
                at for at, pair in enumerate(zip(tokens, want, strict=True)) if len({*pair}) > 1
            )
            _, gap = self.reference.generate(prompt, plan, place + 1, kv_fill=kv_fill)
            assert gap < NEAR[self.kind], f"{plan} parts at token {place}, gap {gap:.2f}"
        return equal


#: Ends an answer.
END = 1
TOKENIZER = AutoTokenizer.from_pretrained(bundled_model())
PROMPTS: list[list[int]] = [
    TOKENIZER(samples(task, "test", 1, 1)[0].prompt, add_special_tokens=False).input_ids
    for task in TASKS
][: len(PLANS)]


@pytest.fixture(scope="module", params=quantised.KINDS)
def model(
    request: Any, tmp_path_factory: pytest.TempPathFactory, engine: Callable[..., Any]
) -> Quantised:
    return Quantised(request.param, tmp_path_factory.mktemp("quantised"), engine)


def test_nothing_skipped_is_stock_bit_for_bit(model: Quantised) -> None:
    params = sampling(None, TOKENS, logprobs=3)
    prompts = [{"prompt_token_ids": one} for one in PROMPTS]
    stock, ours = (
        [
            [
                {token: each.logprob for token, each in step.items()}
                for step in one.outputs[0].logprobs
            ]
            for one in llm.generate(prompts, params, use_tqdm=False)
        ]
        for llm in (model.start(), model.ours("project"))
    )
    assert stock == ours


@pytest.mark.parametrize("kv_fill", ["project", "copy"])
def test_plans_mean_what_they_mean_with_the_dequantised_weights(
    model: Quantised, kv_fill: str
) -> None:
    llm = model.ours(kv_fill)
    assert model.check(llm, PLANS, kv_fill) >= len(PLANS) - 2
    assert model.check(llm, PLANS[::-1], kv_fill) >= len(PLANS) - 2
