# SPDX-License-Identifier: Apache-2.0
"""Answers read under a plan with the prompts' K/V kept, against all tokens read at once."""

from __future__ import annotations

import pytest
import torch
from helpers.fit_models import tiny

from vllm_adaskip.classifiers.plan import SkipPlan
from vllm_adaskip.lab.evaluation.results import WholeAnswer
from vllm_adaskip.lab.fitting.samples import Sample, answer_logits, batch_of
from vllm_adaskip.lab.fitting.sub_layers import leaving_out, visited
from vllm_adaskip.lab.scan.judge import Judge

ASKED = [([5, 30, 17, 42], [9, 11, 12, 13]), ([7, 8], [9, 50, 51]), ([3, 4, 5], [20, 21, 22])]
ANSWERS = [WholeAnswer(item=str(one), prompt=p, answer=a) for one, (p, a) in enumerate(ASKED)]


@pytest.mark.parametrize("family", ["llama", "mistral", "opt", "qwen2", "qwen3"])
@torch.no_grad()
def test_it_reads_what_a_forward_of_all_tokens_reads(family: str) -> None:
    model = tiny(family)
    judge = Judge(model, ANSWERS, "search", batch=2)
    for entries in ([], ["mlp:2"], ["attn:0", "mlp:3"], [1, "attn:3"]):
        plan = SkipPlan.parse(entries, 4)
        agreement, surprise = [], []
        for prompt, answer in ASKED:
            batch = batch_of([Sample("", [*prompt, *answer], len(answer))], torch.device("cpu"))
            with visited(model, leaving_out(batch, [plan])):
                # The first token comes of the prompt.
                under = answer_logits(model, batch)[0, 1:]
            whole = answer_logits(model, batch)[0, 1:]
            top = under.argmax(-1)
            gap = whole.max(-1).values - whole.gather(1, top[:, None])[:, 0]
            agreement.append((top == whole.argmax(-1)).double().mean().item())
            surprise.append(gap.mean().item())
        found = judge.read(plan)
        assert found.agreement == pytest.approx(agreement)
        assert found.surprise == pytest.approx(surprise, abs=1e-4)
        assert found.skip == plan.entries()
        assert (sum(surprise) > 0) == bool(entries)


def test_it_leaves_the_model_as_it_was() -> None:
    model = tiny("llama")
    judge = Judge(model, ANSWERS, "held out")
    plan = SkipPlan.parse([2], 4)
    assert judge.read(plan) == judge.read(plan)
    assert len(model.model.layers) == model.config.num_hidden_layers == 4
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())
