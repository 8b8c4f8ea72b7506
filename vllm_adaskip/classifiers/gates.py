# SPDX-License-Identifier: Apache-2.0
"""What decides inside a forward: gates that close sub-layers to tokens, and exits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_adaskip.classifiers.batch_rule import BatchRule


class TokenGate(ABC):
    """Decides inside a forward which generated tokens leave out more than their plan does.

    For methods that go by what becomes of a token on its way through the layers. One object
    serves one engine. At each forward `begin` is called; then, in running order, for each of
    ``sub_layers`` that anybody's plan runs, `closed`, and, if anybody went through it,
    `observe`. What is decided about a token must depend on its own stream and age alone,
    not on who else is in the batch (isolation): then a sequence that was preempted gets the same
    decisions again when its tokens are replayed in one query (purity).

    Attributes:
        sub_layers: those that the gate may close, MLP ``2 * l + 1``. Attention would also
            need the backend's metadata for whoever is left, and K/V written for the others.
        batch_rule: how the tokens of a step are made to agree; None: each goes by itself.
        deciding: ``[tokens]`` of the forward that `begin` started, those that the gate may
            close anything to; of interest to a batch rule alone.

    """

    sub_layers: frozenset[int]
    batch_rule: BatchRule | None = None
    deciding: NDArray[np.bool_]

    @abstractmethod
    def begin(self, ages: NDArray[np.int64], planned: NDArray[np.int64]) -> bool:
        """Start a forward; False if it will close nothing.

        Args:
            ages: ``[tokens]`` how many generated tokens of its sequence came before each;
                negative: the token is not the gate's business.
            planned: ``[tokens]`` how many of ``sub_layers`` its plan leaves out anyhow.

        """

    @abstractmethod
    def closed(self, sub_layer: int) -> NDArray[np.bool_] | None:
        """Give ``[tokens]``, True where a token leaves the sub-layer out; None for nobody."""

    @abstractmethod
    def observe(self, sub_layer: int, before: Tensor, update: Tensor) -> None:
        """See what a sub-layer just did.

        Args:
            sub_layer: one of ``sub_layers``.
            before: ``[tokens, hidden_size]`` the residual stream before it, in the model's dtype.
            update: ``[tokens, hidden_size]`` what it adds; both are meaningless for tokens that
                left it out.

        """


class Lens(ABC):
    """What the model would predict if it stopped here: final norm, then head (the logit lens)."""

    @abstractmethod
    def check(self, vocabulary: Sequence[int] | None) -> None:
        """Refuse a model without a head, or of whose head parts cannot be had (`ValueError`).

        Args:
            vocabulary: token ids that will be named; None: none ever, empty: not known yet.

        """

    @abstractmethod
    def __call__(
        self, before: Tensor, update: Tensor, vocabulary: Sequence[int] | None = None
    ) -> Tensor:
        """Give logits ``[tokens, vocabulary]`` for a residual stream.

        Args:
            before: ``[tokens, hidden_size]`` the stream before a sub-layer; may be overwritten.
            update: ``[tokens, hidden_size]`` what that adds to it; may be overwritten.
            vocabulary: token ids to give logits of; None: all.

        """


class ExitGate(ABC):
    """Decides inside a forward which tokens need no deeper layer.

    One object serves one engine. At each forward in which somebody may exit, `begin` is called;
    then, in running order, `exits` after each of ``check_layers`` as long as somebody is left.
    What is decided about a token must depend on its own stream alone, as with a `TokenGate`.

    Attributes:
        check_layers: decoder layers after which a token may exit, ascending.
        warm_up: generated tokens of each sequence before any may exit.

    """

    check_layers: tuple[int, ...]
    warm_up: int = 0

    @abstractmethod
    def begin(self, vocabularies: Sequence[Sequence[int] | None]) -> None:
        """Start a forward; of each token that may exit, the ids its request allows, if it says."""

    @abstractmethod
    def exits(
        self, layer: int, tokens: NDArray[np.int64], before: Tensor, update: Tensor
    ) -> NDArray[np.bool_]:
        """Give ``[asked]``, True where a token stops after a layer.

        Args:
            layer: one of ``check_layers``.
            tokens: ``[asked]`` who is left and would run deeper layers, as index into what
                `begin` was told of.
            before: ``[asked, hidden_size]`` and ``update``, as in `Lens`.
            update: see ``before``.

        """
