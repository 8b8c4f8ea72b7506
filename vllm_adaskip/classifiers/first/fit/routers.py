# SPDX-License-Identifier: Apache-2.0
"""Trains routers on a frozen model: FiRST's first phase.

The paper's loss (arXiv 2410.12513), as we read it: ``L_CE + alpha * L_PP + lambda * L_reg``, with
``L_PP`` the sum over layers of the mean ``rho`` and ``L_reg`` the mean over layers of a router's
squared norm; the paper gives ``lambda = 0.01`` and not ``alpha``. Its ``rho`` is per token; what
gates an answer is one number for each layer, as when serving: the prompt's tokens' ``rho``,
reduced. It counts once for each token of the answer, as the cross-entropy does.

Gates are soft in training, as in the paper, though a server's are all or nothing. Hard ones with
the soft gradient (straight-through, with logistic noise) did worse on the bundled model: of
questions of the tune split 93.2, 96.3 and 96.6 % right against 99.1, 98.6 and 99.0 (three seeds,
40 % of layers left out, eight plans).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_adaskip.classifiers.first.fit.gated import gated_loss
from vllm_adaskip.classifiers.first.fit.routing import Routing
from vllm_adaskip.classifiers.first.fit.settings import FirstSettings
from vllm_adaskip.classifiers.first.routers import Routers
from vllm_adaskip.lab.fitting.samples import Batch, Sample
from vllm_adaskip.lab.fitting.training import Curve, Training, in_any_order


def train_routers(
    model: Any,
    samples: Sequence[Sample],
    settings: FirstSettings,
    checkpoint: Path,
    made: Callable[[int], None],
) -> tuple[Routers, Curve]:
    """Return trained routers; the model must be frozen."""
    torch.manual_seed(settings.seed)
    config = model.config.get_text_config()
    routers = Routers(config.num_hidden_layers, config.hidden_size, settings.router_width)
    routers = routers.to(model.device)
    matrices = [one for name, one in routers.named_parameters() if not name.endswith("bias")]
    routed = len(settings.method.inner(config.num_hidden_layers))

    def loss(batch: Batch) -> Mapping[str, Tensor]:
        routing = Routing(routers, settings.method, batch, lambda score: score)
        cross_entropy = gated_loss(model, batch, routing)
        tokens = batch.answer.sum(1)
        rho = torch.stack([*routing.scores.values()]) @ (tokens / tokens.sum())
        norms = torch.stack([one.square().sum() for one in matrices]).sum() / routed
        return {
            "cross-entropy": settings.ce_weight * cross_entropy,
            "penalty": settings.penalty * rho.sum(),
            "regulariser": settings.regularise * norms,
        }

    training = Training(
        dict(routers.named_parameters()), in_any_order(samples, settings.batch, settings.seed),
        steps=settings.steps, rate=settings.lr, checkpoint=checkpoint,
    )  # fmt: skip
    curve = training.run(loss, model.device, made)
    return routers.requires_grad_(False), curve
