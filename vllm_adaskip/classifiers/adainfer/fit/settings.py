# SPDX-License-Identifier: Apache-2.0
"""What a fit of AdaInfer is told."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from vllm_adaskip.classifiers.adainfer.fit.cases import Scope
from vllm_adaskip.classifiers.adainfer.fit.svm import Kernel

#: Fewer examples than this cannot be split five ways, and a fifth held back.
EXAMPLES = 100


class AdaInferSettings(BaseModel):
    """What a fit of AdaInfer is told.

    Attributes:
        classifier: which kind.
        scope: who decides, and about what, as on a server.
        kernel: of ``svm``.
        agreement: share of the cases that stop whose answer has to stay the same, and of all cases
            of each task.
        checks: at most so many check layers; 0: as many as pay.
        check_layers: these and no others; None: found.
        candidates: whether features are computed over the tokens of answers alone.
        seed: of all that is drawn.

    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    classifier: Literal["svm", "crf", "threshold"] = "svm"
    scope: Scope = "answer"
    kernel: Kernel = "rbf"
    agreement: float = Field(default=0.99, gt=0, le=1)
    checks: int = Field(default=0, ge=0)
    check_layers: list[int] | None = Field(default=None, min_length=1)
    candidates: bool = False
    seed: int = 0

    def check(self, num_layers: int, examples: int) -> None:
        """Refuse what a model of this depth, or so few examples, cannot do (`ValueError`)."""
        if examples < EXAMPLES:
            raise ValueError(f"{examples} examples; allowed: {EXAMPLES} or more (see --limit)")
        if self.kernel != "rbf" and self.classifier != "svm":
            raise ValueError(f"--kernel {self.kernel!r} goes with --classifier svm alone")
        if (chosen := self.check_layers) is None:
            return
        if chosen != sorted(set(chosen)) or not (chosen[0] >= 0 and chosen[-1] < num_layers - 1):
            raise ValueError(
                f"--check-layers {','.join(map(str, chosen))}; allowed: ascending, from 0 to "
                f"{num_layers - 2}; after the last layer there is nothing to leave out"
            )
        if self.checks:
            raise ValueError("--checks and --check-layers do not go together")
