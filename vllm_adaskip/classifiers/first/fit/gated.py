# SPDX-License-Identifier: Apache-2.0
"""The differentiable skip, on any decoder of transformers.

A layer's output becomes ``h + g * (layer(h) - h)`` for the tokens of an answer, with one gate
``g`` for each layer and sequence, and stays as it is for the prompt's. That is FiRST's update
(arXiv 2410.12513), read as ``h + rho * phi(h)`` where ``phi`` is what the layer adds.
As printed in the paper ``rho`` and ``1 - rho`` weigh the same term and cancel.

With a gate of 0 this is what a server does that leaves the layer out: the layer still runs here,
but its keys and values of answer tokens are read by no one but itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vllm_adaskip.lab.fitting.samples import Batch, answer_logits, answer_loss
from vllm_adaskip.lab.fitting.sub_layers import decoder_layers

#: Gates ``[rows]`` of a layer, from its index and the stream before it ``[rows, tokens, hidden]``.
Gate = Callable[[int, Tensor], Tensor]


@contextmanager
def gated(model: Any, batch: Batch, gate: Gate) -> Iterator[None]:
    """Have the model's forward passes on this batch skip by these gates."""
    answer = batch.answer[:, :, None]
    hooks = [
        layer.register_forward_hook(partial(_skip, gate, answer, index), with_kwargs=True)
        for index, layer in enumerate(decoder_layers(model))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def gated_logits(model: Any, batch: Batch, gate: Gate) -> Tensor:
    """Return `answer_logits` under these gates."""
    with gated(model, batch, gate):
        return answer_logits(model, batch)


def gated_loss(model: Any, batch: Batch, gate: Gate) -> Tensor:
    """Return `answer_loss` under these gates."""
    return answer_loss(batch, gated_logits(model, batch, gate))


def _skip(
    gate: Gate, answer: Tensor, index: int, layer: Any, args: Any, kwargs: Any, output: Any
) -> Any:
    before = args[0] if args else kwargs["hidden_states"]
    after = output[0] if isinstance(output, tuple) else output
    share = gate(index, before).to(after.dtype)[:, None, None]
    # Exact at both ends: a gate of 0 gives `before` bit for bit, one of 1 gives `after`.
    mixed = torch.lerp(before, after, torch.where(answer, share, 1.0))
    return (mixed, *output[1:]) if isinstance(output, tuple) else mixed
