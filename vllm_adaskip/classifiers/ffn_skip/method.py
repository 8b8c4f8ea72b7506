# SPDX-License-Identifier: Apache-2.0
"""Method ``ffn-skip``: leave out MLPs of the middle, where the residual stream has saturated."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from vllm_adaskip.classifiers.base import Classifier, MethodOptions, Observe, PromptStatistics
from vllm_adaskip.classifiers.calibration import CalibratedOptions
from vllm_adaskip.classifiers.gates import Gate, Lens
from vllm_adaskip.classifiers.plan import DecoderShape, PlanError, SkipPlan

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class FfnSkipOptions(CalibratedOptions):
    """The paper's knobs; its cold regions are the layers at both ends that are kept.

    Attributes:
        scope: ``sequence``: the prompt decides once, decoding pays nothing; ``token``: each
            generated token decides for itself on its way through the layers, as published.
        threshold: leave out where the similarity is at least this. The paper gives no value;
            it sets how much is skipped, and differs by model; ``fit ffn-skip`` finds
            it, for one scope and one middle.
        max_skip: most MLPs that one sequence, or one token, may leave out (the paper's k);
            none: all in the middle.
        warm_up: generated tokens of each sequence before any decides for itself; scope
            ``token`` only. The paper's ablation saturates at 25 to 30.

    """

    falls: ClassVar[bool] = True
    least_kept: ClassVar[int] = 0  # attention stays

    scope: Literal["sequence", "token"] = "sequence"
    threshold: float = Field(default=0.99, ge=-1, allow_inf_nan=False)
    max_skip: int | None = Field(default=None, ge=1)
    warm_up: int = Field(default=25, ge=0)


class FfnSkip(Classifier):
    """FFN-SkipLLM (arXiv 2404.03865), and its form for whole sequences.

    Attention always runs, so the KV cache has no holes. Similarity is that of the residual
    stream before and after the MLP is added. A budget is met by a plan in both scopes: that of
    a sequence goes on in the order of the similarities, that of a token leaves out the last
    MLPs of the middle from its first token on, and the gate may leave out more.
    """

    Options = FfnSkipOptions

    def __init__(
        self, shape: DecoderShape, options: MethodOptions, profile: Path | None = None
    ) -> None:
        assert isinstance(options, FfnSkipOptions)
        self._middle = options.inner(shape.num_layers)
        self._most = min(options.max_skip or len(self._middle), len(self._middle))
        self._shape = shape
        self._options = options
        self._threshold = options.resolved_threshold()
        self.gate_scope = "token" if options.scope == "token" else None
        self.width = 0 if self.gate_scope else len(self._middle)

    def check(self, budget: float) -> None:
        """Refuse a budget below what is left without as many MLPs as may be left out."""
        self._least(budget)

    def observer(self, hidden_size: int, device: torch.device, lens: Lens | None = None) -> Observe:
        """Keep each token's similarity at the MLPs of the middle; attention costs nothing."""
        from vllm_adaskip.classifiers.cosine import cosine  # here: it loads torch

        def observe(sub_layer: int, before: Tensor, update: Tensor, values: Tensor) -> None:
            layer, is_mlp = divmod(sub_layer, 2)
            if is_mlp and layer in self._middle:
                values[:, layer - self._middle.start] = cosine(before, update)

        return observe

    def gate(self, hidden_size: int, device: torch.device, lens: Lens) -> Gate:
        """Return the gate of scope ``token``."""
        from vllm_adaskip.classifiers.ffn_skip.gate import MlpGate  # here: it loads torch

        return MlpGate(
            self._middle,
            threshold=self._threshold,
            warm_up=self._options.warm_up,
            max_skip=self._most,
            hidden_size=hidden_size,
            device=device,
        )

    def decide(self, budget: float, prompt: PromptStatistics | None) -> SkipPlan:
        """Leave out the most similar MLPs, as far as the threshold or the budget says."""
        least = self._least(budget)
        if prompt is None:
            return self._without(self._middle[len(self._middle) - least :])
        similar = dict(zip(self._middle, prompt.mean.tolist(), strict=True))
        order = sorted(self._middle, key=lambda layer: (-similar[layer], layer))
        above = sum(value >= self._threshold for value in similar.values())
        return self._without(order[: max(min(above, self._most), least)])

    def _least(self, budget: float) -> int:
        """Return the fewest MLPs that must be left out to meet a budget (`PlanError`: too many)."""
        for count in range(self._most + 1):
            if (kept := self._without(range(count)).share(self._shape)) <= budget:
                return count
        raise PlanError(
            f"a budget of {budget:g} cannot be met: method 'ffn-skip' leaves out at most "
            f"{self._most} MLPs here, which keeps {kept:.3f} of the decoder's compute"
        )

    def _without(self, mlps: Iterable[int]) -> SkipPlan:
        return SkipPlan(self._shape.num_layers, mlp=sum(1 << layer for layer in mlps))
