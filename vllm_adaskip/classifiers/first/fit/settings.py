# SPDX-License-Identifier: Apache-2.0
"""What a fit of FiRST is told."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from vllm_adaskip.classifiers.first.method import FirstOptions


class FirstSettings(BaseModel):
    """All that decides what comes of a fit, but for model and examples.

    Attributes:
        steps: updates of the routers, at rate ``lr``, of ``batch`` examples each.
        penalty: ``alpha``, the price of a layer in nats of cross-entropy per answer token.
        regularise: ``lambda``.
        ce_weight: of the cross-entropy.
        router_width: see `Routers`.
        method: options of the method, but for what is fitted: threshold, calibration, codebook.
        target_skip: share of layers to leave out on average, over answer tokens; 0: threshold 0.5.
        codebook: at most so many plans; 0: none.
        lora_steps: updates of the LoRA weights, at rate ``lora_lr``; 0: no LoRA.
        lora_rank: rank of the LoRA weights.
        seed: of all that is drawn.

    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    steps: int = Field(default=300, ge=1)
    batch: int = Field(default=16, ge=1)
    lr: float = Field(default=0.01, gt=0)
    penalty: float = Field(default=0.1, ge=0)
    regularise: float = Field(default=0.01, ge=0)
    ce_weight: float = Field(default=1.0, ge=0)
    router_width: int = Field(default=0, ge=0)
    method: FirstOptions = FirstOptions()
    target_skip: float = Field(default=0.25, ge=0, lt=1)
    codebook: int = Field(default=8, ge=0, le=256)
    lora_steps: int = Field(default=0, ge=0)
    lora_lr: float = Field(default=1e-3, gt=0)
    lora_rank: int = Field(default=8, ge=1)
    seed: int = 0

    def check(self, num_layers: int) -> None:
        """Refuse what a model of this depth cannot do (`ValueError`)."""
        most = len(self.method.inner(num_layers)) / num_layers
        if self.target_skip > most:
            raise ValueError(
                f"target_skip {self.target_skip:g}; allowed: 0 to {most:.3g}, as keep_first and "
                f"keep_last keep the other layers of {num_layers}"
            )
