# SPDX-License-Identifier: Apache-2.0
"""Attention and MLP of each decoder layer of a transformers model: seen, and left out.

A layer adds two updates to the residual stream, its attention's and its MLP's. A visitor of
a model sees the stream before each, and the update, as a server's methods do; and may change it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vllm_adaskip.classifiers.plan import DecoderShape, SkipPlan
from vllm_adaskip.engine.prompt_plan import PromptPlan
from vllm_adaskip.lab.fitting.samples import Batch

#: What transformers calls the module whose output is the update.
_ATTENTION = ("self_attn",)
_MLP = ("mlp", "fc2")
#: Gives the update to make, of sub-layer (attention ``2 * l``, MLP ``2 * l + 1``), stream before it
#: and its own update, both ``[rows, tokens, hidden]``.
Visit = Callable[[int, Tensor, Tensor], Tensor]


class DecoderError(ValueError):
    """A model whose decoder layers, or their parts, cannot be told."""


def decoder_layers(model: Any) -> nn.ModuleList:
    """Find the list of decoder layers in a transformers model, whatever it calls them.

    Raises:
        DecoderError: an encoder-decoder, or not exactly one list of as many as its config says.

    """
    config = model.config.get_text_config()
    number = config.num_hidden_layers
    found = [
        one for one in model.modules() if isinstance(one, nn.ModuleList) and len(one) == number
    ]
    if model.config.is_encoder_decoder or len(found) != 1:
        raise DecoderError(
            f"{type(model).__name__}: {len(found)} lists of {number} decoder layers; "
            "allowed: decoder-only models with one"
        )
    return found[0]


def decoder_shape(model: Any) -> DecoderShape:
    """Count the parameters that a token meets, a layer's on average; what is no attention is MLP.

    Of a mixture of experts these are the experts that it picks.
    """
    layers = decoder_layers(model)
    attention = sum(_weights(_part(layer, _ATTENTION)) for layer in layers)
    mlp = sum(_weights(layer) - _left_idle(layer, model.config) for layer in layers) - attention
    return DecoderShape(len(layers), attention // len(layers), mlp // len(layers))


@contextmanager
def visited(model: Any, visit: Visit) -> Iterator[None]:
    """Have a function see, and make, each update of the model's forward passes.

    Raises:
        DecoderError: at once, or as the model runs: its layers do not add two updates to a stream.

    """
    hooks = []
    try:
        for index, layer in enumerate(decoder_layers(model)):
            one = _Layer(index, visit)
            attention, mlp = (_part(layer, names) for names in (_ATTENTION, _MLP))
            hooks += [
                layer.register_forward_pre_hook(one.enter, with_kwargs=True),
                attention.register_forward_hook(one.update),
                mlp.register_forward_hook(one.update),
                layer.register_forward_hook(one.leave),
            ]
        yield
    finally:
        for hook in hooks:
            hook.remove()


def leaving_out(
    batch: Batch,
    plans: Sequence[SkipPlan],
    prompts: Sequence[PromptPlan | None] = (),
    end: int | None = None,
) -> Visit:
    """Return the visit that has each row's answer follow a plan, and its prompt another.

    The model may be run on some columns of the batch alone, up to ``end``.

    Args:
        batch: of as many rows as there are plans.
        plans: what answers' tokens leave out.
        prompts: what prompts' tokens leave out; None: nothing; empty: none of them does.
        end: the column behind the last that is run; None: the batch's last is.

    """
    whole = SkipPlan(plans[0].num_layers)
    each = [*prompts] or [None] * len(plans)
    skips = _masks(plans, batch)
    read = _masks([one.plan if one else whole for one in each], batch)
    lengths = batch.prompt.sum(1).tolist()
    full = [one.full_from(size) if one else 0 for one, size in zip(each, lengths, strict=True)]
    passed = batch.prompt & (batch.positions < torch.tensor(full, device=read.device)[:, None])

    def visit(sub_layer: int, before: Tensor, update: Tensor) -> Tensor:
        left_out = skips[:, sub_layer, None] & batch.answer | read[:, sub_layer, None] & passed
        return update.masked_fill(left_out[:, :end][:, -before.shape[1] :, None], 0.0)

    return visit


def _masks(plans: Sequence[SkipPlan], batch: Batch) -> Tensor:
    """Return ``[rows, 2 * num_layers]``: which sub-layers each row leaves out."""
    return torch.stack([torch.from_numpy(plan.mask()) for plan in plans]).to(batch.ids.device)


class _Layer:
    """One decoder layer while it runs."""

    def __init__(self, index: int, visit: Visit) -> None:
        self._index, self._visit = index, visit

    def enter(self, layer: Any, args: Any, kwargs: Any) -> None:
        self._stream = args[0] if args else kwargs["hidden_states"]
        self._next = 2 * self._index

    def update(self, part: Any, args: Any, output: Any) -> Any:
        update = output[0] if isinstance(output, tuple) else output
        shaped = update.view_as(self._stream)
        made = self._visit(self._next, self._stream, shaped)
        self._stream = self._stream + made
        self._next += 1
        made = made.view_as(update)
        return (made, *output[1:]) if isinstance(output, tuple) else made

    def leave(self, layer: Any, args: Any, output: Any) -> None:
        after = output[0] if isinstance(output, tuple) else output
        if self._next != 2 * self._index + 2 or not torch.equal(after, self._stream):
            raise DecoderError(
                f"{type(layer).__name__}: what it gives is not the stream with its attention's "
                "and its MLP's output added; allowed: layers that norm before, and add after"
            )


def _part(layer: nn.Module, names: Sequence[str]) -> nn.Module:
    for name in names:
        if isinstance(part := getattr(layer, name, None), nn.Module):
            return part
    raise DecoderError(f"{type(layer).__name__}: no module {' or '.join(names)}")


def _left_idle(layer: nn.Module, config: Any) -> int:
    """Count the parameters of the experts that a token does not pick."""
    experts = getattr(_part(layer, _MLP), "experts", None)
    if experts is None:
        return 0
    number, picked = int(config.num_experts), int(config.num_experts_per_tok)
    return _weights(experts) * (number - picked) // number


def _weights(module: nn.Module) -> int:
    return sum(one.numel() for one in module.parameters() if one.ndim > 1)
