# SPDX-License-Identifier: Apache-2.0
"""A model's final norm and LM head, applied to the residual stream of any layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from vllm_adaskip.classifiers import Lens, Stream


class Head(Lens):
    """vLLM's own, so that an exit after the last layer would predict what the model does.

    Under tensor parallelism the head is split by vocabulary; vLLM gathers the logits of all ranks
    on all ranks, so that all see the same numbers.

    Since 0.26 (`lm_head`, `compute_logits`, `LogitsProcessor.use_all_gather`, `scale`, `soft_cap`;
    `VocabParallelEmbedding.quant_method`, `tp_size`). Remove when vLLM's models give logits of any
    hidden state and of chosen tokens.
    """

    def __init__(
        self, model: Any, finish: Callable[[Stream], Tensor], is_adapted: bool = False
    ) -> None:
        """Take the model, and what makes its head's input of a stream, which it may change.

        ``is_adapted``: requests may bring LoRA adapters, which may change the head.
        """
        self._model = model
        self._finish = finish
        self._is_adapted = is_adapted

    def check(self, vocabulary: Sequence[int] | None) -> None:
        """Refuse a model without a head, or of whose head parts cannot be had."""
        if self._is_adapted:
            raise ValueError(
                "early exit looks at logits in the middle of a forward, where vLLM has none with "
                "adapters; remove --enable-lora, or use another method"
            )
        head = getattr(self._model, "lm_head", None)
        if not isinstance(head, VocabParallelEmbedding):
            raise ValueError(
                "this model has no LM head here, which early exit needs; run it without pipeline "
                "parallelism, or with another method"
            )
        if head.tp_size > 1 and not self._model.logits_processor.use_all_gather:
            raise ValueError(
                "tensor-parallel ranks would decide on different logits; set "
                "--tensor-parallel-size to 1, or use another method"
            )
        if vocabulary is None:
            return
        plain = isinstance(head.quant_method, UnquantizedEmbeddingMethod)
        processor = self._model.logits_processor
        if head.tp_size > 1 or not plain or processor.soft_cap is not None:
            raise ValueError(
                "a part of the vocabulary can be looked at only in an LM head that is in one piece "
                "and not quantised; set option vocabulary to 'full'"
            )
        if wrong := [one for one in vocabulary if not 0 <= one < head.org_vocab_size]:
            raise ValueError(
                f"candidates: token {wrong[0]} does not exist; allowed with this model: 0 to "
                f"{head.org_vocab_size - 1}"
            )

    def __call__(self, stream: Stream, vocabulary: Sequence[int] | None = None) -> Tensor:
        """Run what follows the last layer, then the head or the rows of it that are wanted."""
        update, before = stream
        hidden = self._finish(Stream(update.clone(), before if before is None else before.clone()))
        if vocabulary is None:
            logits: Tensor = self._model.compute_logits(hidden)
            return logits
        rows = self._model.lm_head.weight[torch.tensor(vocabulary, device=hidden.device)]
        scale: float = self._model.logits_processor.scale
        return nn.functional.linear(hidden, rows) * scale


class DraftHead:
    """The LM head for drafts: the likeliest of all tokens, or of some.

    Attributes:
        vocabulary: ids of these, ``[tokens]`` int64; None: all.

    Since and remove when: see `Head`.
    """

    def __init__(self, model: Any, head: Head) -> None:
        """Take a model and its head."""
        self._model, self._head = model, head
        self.vocabulary: Tensor | None = None
        self._rows: nn.Module | None = None

    def limit(self, vocabulary: Tensor | None) -> None:
        """Let drafts have these tokens alone; None: all.

        Raises:
            ValueError: parts of this model's head cannot be had, or it has no such tokens.

        """
        try:
            self._head.check(None if vocabulary is None else vocabulary.tolist())
        except ValueError as error:
            raise ValueError(f"draft: {error}") from None
        self.vocabulary = vocabulary

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``[rows]`` probabilities and ids of the likeliest tokens of ``[rows, width]``."""
        logits = self._logits(hidden).float()
        top, picked = logits.max(dim=-1)
        if self.vocabulary is not None:
            picked = self.vocabulary[picked]
        return (logits - top[:, None]).exp_().sum(dim=-1).reciprocal_(), picked

    def _logits(self, hidden: Tensor) -> Tensor:
        if self.vocabulary is None:
            logits: Tensor = self._model.compute_logits(hidden)
            return logits
        method = self._model.lm_head.quant_method
        if self._rows is None:  # weights are loaded by now; on a CPU vLLM packs them for its kernel
            self._rows = nn.Module()
            rows = self._model.lm_head.weight[self.vocabulary]
            self._rows.register_parameter("weight", nn.Parameter(rows, requires_grad=False))
            method.process_weights_after_loading(self._rows)
        scale: float = self._model.logits_processor.scale
        return method.apply(self._rows, hidden) * scale  # type: ignore[no-any-return]
