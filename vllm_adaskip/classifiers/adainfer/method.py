# SPDX-License-Identifier: Apache-2.0
"""Method ``adainfer``: stop where a classifier says that deeper layers change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from vllm_adaskip.classifiers.adainfer.rule_file import load_rule
from vllm_adaskip.classifiers.adainfer.rules import Crf, ExitRule, Threshold
from vllm_adaskip.classifiers.base import Classifier, MethodOptions, Observe, PromptStatistics
from vllm_adaskip.classifiers.early_exit import deepest_exit, exit_plan
from vllm_adaskip.classifiers.gates import Gate, Lens, Stream
from vllm_adaskip.classifiers.plan import DecoderShape, PlanError, SkipPlan

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class AdaInferOptions(MethodOptions):
    """What may stop, where, and by which rule.

    Attributes:
        scope: ``answer``: requests for one token, prompt and all, inside prefill; ``prompt``: the
            last prompt token decides how deep its sequence decodes; ``token``: each generated
            token.
        classifier: the rule that the profile holds; ``threshold`` also does without a profile.
        check_layers: decoder layers after which to look; none: all that were fitted.
        top_prob: least probability of the likeliest token, instead of the profile's, at all check
            layers; ``threshold`` only.
        gap: least distance to the second likeliest, likewise.
        vocabulary: tokens that the features are computed over: ``full``, the ``candidates``, or
            what a ``request`` allows (``allowed_token_ids``, full where it names none).
        candidates: token ids for ``vocabulary`` ``candidates``.
        warm_up: generated tokens of each sequence before any may stop; scope ``token`` only.

    """

    scope: Literal["answer", "prompt", "token"] = "answer"
    classifier: Literal["threshold", "svm", "crf"] = "threshold"
    check_layers: list[int] | None = Field(default=None, min_length=1, max_length=4096)
    top_prob: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    gap: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    vocabulary: Literal["full", "candidates", "request"] = "full"
    candidates: list[int] = Field(default=[], max_length=65_536)
    warm_up: int = Field(default=0, ge=0)


class AdaInfer(Classifier):
    """Early exit by two features of the next token's distribution, AdaInfer (arXiv 2403.02181).

    Published for answers of one token, which is scope ``answer``. A budget is a depth that no
    sequence goes beyond; the rule may stop earlier.
    """

    Options = AdaInferOptions

    def __init__(
        self, shape: DecoderShape, options: MethodOptions, profile: Path | None = None
    ) -> None:
        assert isinstance(options, AdaInferOptions)
        if options.vocabulary == "request" and options.scope != "answer":
            raise ValueError(
                f"vocabulary 'request' does not go with scope {options.scope!r}: what a request "
                "allows is about one answer; allowed: 'full', 'candidates', or scope 'answer'"
            )
        if options.vocabulary == "candidates" and not options.candidates:
            raise ValueError("vocabulary 'candidates' needs token ids (option candidates)")
        self._shape = shape
        self._options = options
        self._rule = _rule(options, profile)
        self._checks = _check_layers(options, self._rule, shape)
        self.last_only = options.scope == "prompt"
        self.width = 2 * len(self._checks) if self.last_only else 0
        self.gate_scope = None if options.scope == "prompt" else options.scope
        self.gates_attention = self.gate_scope is not None

    def check(self, budget: float) -> None:
        """Refuse a budget below what one layer takes."""
        self._deepest(budget)

    def observer(self, hidden_size: int, device: torch.device, lens: Lens | None = None) -> Observe:
        """Keep the features of each check layer, of the last prompt token (scope ``prompt``)."""
        from vllm_adaskip.classifiers.adainfer.gate import features  # here: it loads torch

        assert lens is not None
        lens.check(self._vocabulary)
        places = {layer: 2 * place for place, layer in enumerate(self._checks)}

        def observe(sub_layer: int, before: Tensor, update: Tensor, values: Tensor) -> None:
            layer, is_mlp = divmod(sub_layer, 2)
            if is_mlp and (place := places.get(layer)) is not None:
                values[:, place : place + 2] = features(
                    lens(Stream(update, before), self._vocabulary)
                )

        return observe

    def decide(self, budget: float, prompt: PromptStatistics | None) -> SkipPlan:
        """Stop at the budget's depth, or above the first check layer where all is settled."""
        depth = self._deepest(budget)
        if prompt is not None:
            depth = min(depth, self._settled_depth(prompt))
        return exit_plan(depth, self._shape)

    def gate(self, hidden_size: int, device: torch.device, lens: Lens) -> Gate:
        """Return the gate of scopes ``answer`` and ``token``."""
        from vllm_adaskip.classifiers.adainfer.gate import LensGate  # here: it loads torch

        return LensGate(
            self._rule,
            lens,
            check_layers=self._checks,
            vocabulary=self._vocabulary,
            by_request=self._options.vocabulary == "request",
            warm_up=self._options.warm_up if self.gate_scope == "token" else 0,
        )

    @property
    def _vocabulary(self) -> list[int] | None:
        if self._options.vocabulary != "candidates":
            return None
        return list(dict.fromkeys(self._options.candidates))

    def _settled_depth(self, prompt: PromptStatistics) -> int:
        seen = np.zeros((1, 2))
        found = prompt.last.reshape(-1, 1, 2)
        for layer, features in zip(self._checks, found, strict=True):
            settled, seen = self._rule.settled(layer, features, seen)
            if settled[0]:
                return layer + 1
        return self._shape.num_layers

    def _deepest(self, budget: float) -> int:
        if depth := deepest_exit(budget, self._shape):
            return depth
        least = exit_plan(1, self._shape).share(self._shape)
        raise PlanError(
            f"a budget of {budget:g} cannot be met: method 'adainfer' runs at least one layer, "
            f"which is {least:.3f} of the decoder's compute"
        )


def _rule(options: AdaInferOptions, profile: Path | None) -> ExitRule:
    """Read the profile's rule, or make one of the options."""
    own = options.top_prob is not None or options.gap is not None
    if own and options.classifier != "threshold":
        raise ValueError(
            f"top_prob and gap do not go with classifier {options.classifier!r}, which has no "
            "thresholds; leave them out"
        )
    if profile is not None:
        rule = load_rule(options.classifier, profile)
        layers = rule.layers
    elif options.classifier != "threshold" or options.check_layers is None or not own:
        raise ValueError(
            f"method 'adainfer' needs a profile with classifier {options.classifier!r} (option "
            "profile), or classifier 'threshold' with check_layers and top_prob or gap"
        )
    else:
        layers = tuple(options.check_layers)
        rule = Threshold(layers, np.zeros(len(layers)), np.zeros(len(layers)))
    if not own:
        return rule
    assert isinstance(rule, Threshold)
    top_prob, gap = options.top_prob, options.gap
    return Threshold(
        layers,
        rule.top_prob if top_prob is None else np.full(len(layers), top_prob),
        rule.gap if gap is None else np.full(len(layers), gap),
    )


def _check_layers(options: AdaInferOptions, rule: ExitRule, shape: DecoderShape) -> tuple[int, ...]:
    """Return the layers to look after (`ValueError`: not fitted, or the model has none such)."""
    chosen = rule.layers if options.check_layers is None else tuple(options.check_layers)
    if list(chosen) != sorted(set(chosen)):
        raise ValueError(f"check_layers {list(chosen)} must ascend")
    if not (chosen[0] >= 0 and chosen[-1] < shape.num_layers - 1):
        raise ValueError(
            f"check_layers {list(chosen)}: after the last layer there is nothing to leave out; "
            f"allowed with this model: 0 to {shape.num_layers - 2}"
        )
    if not set(chosen) <= set(rule.layers) or (isinstance(rule, Crf) and chosen != rule.layers):
        which = "exactly" if isinstance(rule, Crf) else "some of"
        raise ValueError(
            f"check_layers {list(chosen)}; allowed with this profile: {which} {list(rule.layers)}"
        )
    return chosen
