# SPDX-License-Identifier: Apache-2.0
"""What decides inside a forward: a gate, and the lens through which it may look."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor


class Stream(NamedTuple):
    """The residual stream of some tokens, ``update + before``.

    Attributes:
        update: ``[tokens, hidden_size]`` what the sub-layer that ran last adds; before the first
            one the stream itself.
        before: ``[tokens, hidden_size]`` the stream before that; None before the first sub-layer.

    """

    update: Tensor
    before: Tensor | None


#: Returns the stream of those asked tokens that a bool array ``[asked]`` marks; None: of all.
#: It is not a copy: change nothing in it.
Look = Callable[[NDArray[np.bool_] | None], Stream]


class Lens(ABC):
    """What the model would predict if it stopped here: final norm, then head (the logit lens)."""

    @abstractmethod
    def check(self, vocabulary: Sequence[int] | None) -> None:
        """Refuse a model without a head, or of whose head parts cannot be had (`ValueError`).

        Args:
            vocabulary: token ids that will be named; None: none ever, empty: not known yet.

        """

    @abstractmethod
    def __call__(self, stream: Stream, vocabulary: Sequence[int] | None = None) -> Tensor:
        """Return logits ``[tokens, vocabulary]`` for a stream, which stays as it is.

        Args:
            stream: of some tokens, after any sub-layer.
            vocabulary: token ids to return logits of; None: all.

        """


class Gate(ABC):
    """Decides inside a forward what tokens leave out from there on, beside their plan.

    For methods that go by what becomes of a token on its way through the layers. One object
    serves one engine. `begin` is called at each forward that may ask about a token; then, in
    running order, `after` behind each of ``sub_layers``, with the tokens that ran it and have
    something left to run. What is decided about a token must depend on its own stream alone, not
    on the other tokens of the batch (isolation): then a sequence that was preempted gets the same
    decisions again when its tokens are replayed in one query (purity).

    Attributes:
        sub_layers: those behind which tokens are asked about, MLP ``2 * l + 1``.
        warm_up: generated tokens of each sequence before any is asked about.

    """

    sub_layers: frozenset[int]
    warm_up: int = 0

    @abstractmethod
    def begin(
        self, planned: NDArray[np.bool_], allowed: Sequence[Sequence[int] | None] | None
    ) -> None:
        """Start a forward.

        Args:
            planned: ``[tokens, 2 * num_layers]`` what the plan of each token that may be asked
                about leaves out anyhow.
            allowed: of each of these tokens the ids that its request may draw, None where it
                does not say; None: no request says.

        """

    @abstractmethod
    def after(
        self, sub_layer: int, tokens: NDArray[np.int64], look: Look
    ) -> NDArray[np.bool_] | None:
        """Decide behind a sub-layer.

        Args:
            sub_layer: one of ``sub_layers``.
            tokens: ``[asked]`` as index into what `begin` was told of.
            look: shows the stream of the asked tokens.

        Returns:
            ``[asked, 2 * num_layers]``, True where a token leaves out a sub-layer above; None:
            nothing changes.

        """
