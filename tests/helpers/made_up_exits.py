# SPDX-License-Identifier: Apache-2.0
"""What tests of AdaInfer's fit share: decisions whose answer settles at a depth of their own."""

from __future__ import annotations

import numpy as np

from vllm_adaskip.classifiers.adainfer.fit.cases import Cases

LAYERS = 6


def made_up(count: int, *, each: int = 1, seed: int = 0) -> Cases:
    """Return cases of two tasks; ``easy`` settles from layer 1 on, ``hard`` from layer 3 on.

    A settled case is sure, an unsettled one mostly not, and right by chance at times.
    """
    draw = np.random.default_rng(seed)
    samples = np.repeat(np.arange(count), each)
    tasks = np.where(samples % 2 == 0, "easy", "hard")
    least = np.where(tasks == "easy", 1, 3)
    depth = np.minimum(least + draw.integers(0, 3, len(samples)), LAYERS - 1)
    settled = np.arange(LAYERS) >= depth[:, None]
    noise = draw.uniform(0, 1, settled.shape)
    top_prob = np.where(settled, 0.85 + 0.15 * noise, 0.2 + 0.7 * noise)
    gap = np.maximum(2 * top_prob - 1, 0) * draw.uniform(0.95, 1, settled.shape)
    agrees = settled | (draw.random(settled.shape) < 0.1)
    return Cases(
        features=np.stack([top_prob, gap], axis=-1),
        agrees=agrees,
        right=agrees.copy(),
        samples=samples,
        tasks=tasks,
        passes=np.ones(len(samples), dtype=np.int64),
    )
