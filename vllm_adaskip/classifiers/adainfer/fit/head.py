# SPDX-License-Identifier: Apache-2.0
"""What a transformers model would predict if it stopped after a layer: final norm, then head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vllm_adaskip.lab.fitting.sub_layers import DecoderError, decoder_layers


class FinalHead:
    """All that a model applies to the stream after its last decoder layer, found by watching it.

    Args:
        model: of transformers.
        ids: a few tokens to run it on.

    Raises:
        DecoderError: no LM head; or norms and head, called on the last layer's stream, do not
            give the model's logits, so that something between them cannot be told.

    """

    def __init__(self, model: Any, ids: Sequence[int]) -> None:
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise DecoderError(
                f"{type(model).__name__}: no LM head; allowed: causal language models, whose "
                "head is one linear layer"
            )
        self._head = head
        stream, logits = self._watch(model, torch.tensor([ids], device=model.device))
        if not torch.equal(self.logits(stream), logits):
            names = ", ".join(type(one).__name__ for one in [*self._between, head])
            raise DecoderError(
                f"{type(model).__name__}: {names} do not give its logits; allowed: models "
                "that do nothing else after their last layer"
            )

    @property
    def weights(self) -> tuple[int, int]:
        """Tokens and size of what the head's rows are multiplied with."""
        return self._head.out_features, self._head.in_features

    def logits(self, stream: Tensor) -> Tensor:
        """Return ``[..., vocabulary]`` of a stream ``[..., hidden]``."""
        for module in self._between:
            stream = module(stream)
        logits: Tensor = self._head(stream)
        return logits

    @torch.no_grad()
    def _watch(self, model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Find what runs after the last layer; give that layer's stream, and the logits."""
        layers = decoder_layers(model)
        decoder = next(one for one in model.modules() if layers in one.children())
        streams: list[Tensor] = []
        self._between: list[nn.Module] = []

        def left(module: Any, args: Any, output: Any) -> None:
            streams.append(output[0] if isinstance(output, tuple) else output)

        def ran(module: nn.Module, args: Any, output: Any) -> None:
            if streams:
                self._between.append(module)

        hooks = [layers[-1].register_forward_hook(left)]
        hooks += [one.register_forward_hook(ran) for one in decoder.children() if one != layers]
        try:
            logits: Tensor = model(ids, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        return streams[0], logits
