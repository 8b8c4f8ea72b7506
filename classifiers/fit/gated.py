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

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vllm_adaskip.classifiers.fit.batch import Batch
from vllm_adaskip.evaluation.sweep import IGNORED

#: Gates ``[rows]`` of a layer, from its index and the stream before it ``[rows, tokens, hidden]``.
Gate = Callable[[int, Tensor], Tensor]


class GateError(ValueError):
    """A model whose decoder layers cannot be told."""


def decoder_layers(model: Any) -> nn.ModuleList:
    """Find the list of decoder layers in a transformers model, whatever it calls them.

    Raises:
        GateError: an encoder-decoder, or not exactly one list of as many layers as its config says.

    """
    config = model.config.get_text_config()
    number = config.num_hidden_layers
    found = [
        one for one in model.modules() if isinstance(one, nn.ModuleList) and len(one) == number
    ]
    if model.config.is_encoder_decoder or len(found) != 1:
        raise GateError(
            f"{type(model).__name__}: {len(found)} lists of {number} decoder layers; "
            "allowed: decoder-only models with one"
        )
    return found[0]


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


def answer_logits(model: Any, batch: Batch, gate: Gate) -> Tensor:
    """Give logits ``[rows, tokens - 1 or fewer, vocabulary]`` for the last of `Batch.labels`."""
    wanted = inspect.signature(model.forward).parameters
    first = int(batch.answer.any(0).int().argmax())
    inputs = {
        "input_ids": batch.ids,
        "attention_mask": batch.real.long(),
        "position_ids": batch.positions,
        "use_cache": False,
        # The logits of a prompt would take more memory than all else.
        "logits_to_keep": batch.ids.shape[1] - first + 1,
    }
    with gated(model, batch, gate):
        output = model(**{name: each for name, each in inputs.items() if name in wanted})
    logits: Tensor = output.logits[:, first - 1 - batch.ids.shape[1] : -1]
    return logits


def answer_loss(model: Any, batch: Batch, gate: Gate) -> Tensor:
    """Give the mean cross-entropy of the answers' tokens."""
    logits = answer_logits(model, batch, gate)
    labels = batch.labels[:, -logits.shape[1] :]
    return functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED
    )


def _skip(
    gate: Gate, answer: Tensor, index: int, layer: Any, args: Any, kwargs: Any, output: Any
) -> Any:
    before = args[0] if args else kwargs["hidden_states"]
    after = output[0] if isinstance(output, tuple) else output
    share = gate(index, before).to(after.dtype)[:, None, None]
    # Exact at both ends: a gate of 0 gives `before` bit for bit, one of 1 gives `after`.
    mixed = torch.lerp(before, after, torch.where(answer, share, 1.0))
    return (mixed, *output[1:]) if isinstance(output, tuple) else mixed
