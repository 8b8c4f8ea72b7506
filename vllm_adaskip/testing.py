# SPDX-License-Identifier: Apache-2.0
"""What an engine relies on in a method, to be checked in the tests of that method."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_adaskip.classifiers import Classifier, DecoderShape, PlanError, PromptStatistics, SkipPlan

#: Of a small decoder, whose MLPs have three times the parameters of its attention.
SHAPE = DecoderShape(4, attention_parameters=1, mlp_parameters=3)
HIDDEN = 16
BUDGETS = (1.0, 0.8, 0.7, 0.5, 0.01)


def check_method(
    method: type[Classifier],
    options: Mapping[str, Any] | None = None,
    profile: Path | None = None,
    *,
    shape: DecoderShape = SHAPE,
    hidden_size: int = HIDDEN,
) -> None:
    """Make a method as a server does, and check it (`AssertionError` says what is wrong).

    Args:
        method: the class.
        options: its own, as they would stand in ``additional_config``.
        profile: folder of its tensors, if it has any.
        shape: of the decoder that it is made for.
        hidden_size: of that decoder.

    """
    classifier = method(shape, method.Options.model_validate(dict(options or {})), profile)
    check_plans(classifier, shape)
    check_observer(classifier, shape, hidden_size)
    check_regrets(classifier, shape)


def a_prompt(classifier: Classifier, seed: int = 0) -> PromptStatistics | None:
    """Return statistics as they might come; None for a method that does not read prompts."""
    if not classifier.width:
        return None
    mean, last = np.random.default_rng(seed).random((2, classifier.width))
    return PromptStatistics(5, mean, last)


def check_plans(classifier: Classifier, shape: DecoderShape) -> None:
    """Check that a plan is one of this model, within its budget, and the same again."""
    for budget in BUDGETS:
        try:
            classifier.check(budget)
        except PlanError as error:
            assert f"{budget:g}" in str(error), f"check does not name the budget: {error}"
            continue
        for seed in range(5):
            prompt = a_prompt(classifier, seed)
            plan = classifier.decide(budget, prompt)
            assert isinstance(plan, SkipPlan), f"decide returned {plan!r}, no SkipPlan"
            assert plan.num_layers == shape.num_layers, f"{plan} is for {plan.num_layers} layers"
            assert not plan.skips_everything, f"at a budget of {budget:g} nothing runs"
            assert plan.share(shape) <= budget, (
                f"'{plan}' keeps {plan.share(shape):.3f}, more than the budget of {budget:g} that "
                "check let pass"
            )
            assert plan == classifier.decide(budget, prompt), (
                "the same prompt got another plan; decide must be a pure function"
            )


def check_observer(classifier: Classifier, shape: DecoderShape, hidden_size: int) -> None:
    """Check that each token is observed by itself, whatever batch or chunk it comes in."""
    if not classifier.width:
        return
    generator = torch.Generator().manual_seed(0)
    before, update = torch.randn(2, 6, hidden_size, generator=generator)
    observe = classifier.observer(hidden_size, before.device)
    whole, parts = torch.zeros(2, 6, classifier.width)
    for sub_layer in range(2 * shape.num_layers):
        observe(sub_layer, before, update, whole)
        for chunk in (slice(0, 1), slice(1, 4), slice(4, 6)):
            observe(sub_layer, before[chunk], update[chunk], parts[chunk])
    assert whole.any(), "the observer wrote nothing"
    assert torch.allclose(whole, parts, atol=1e-6), "what is kept of a token depends on others"


def check_regrets(classifier: Classifier, shape: DecoderShape) -> None:
    """Check that the own plan is regretted least, and all from 0 to 1, or infinitely."""
    if not classifier.coalesces:
        return
    layers = shape.num_layers
    others = [SkipPlan.parse(one, layers).mask() for one in ([], [0], [1], [2], [1, 2], ["mlp:1"])]
    for seed in range(5):
        prompt = a_prompt(classifier, seed)
        assert prompt is not None, "a method that compares plans reads prompts"
        own = classifier.decide(0.75, prompt)
        found = classifier.regrets(own, np.array([own.mask(), *others]), prompt)
        assert found[0] == 0, f"the own plan is regretted by {found[0]:g}"
        assert ((found >= 0) & (found <= 1) | (found == np.inf)).all(), f"regrets of {found}"
