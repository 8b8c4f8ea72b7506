# SPDX-License-Identifier: Apache-2.0
"""Which layers to delete one after the other: SLEB, arXiv 2402.09025.

Each step tries every layer that is left and deletes the one without which the loss is least.
Here the loss is the reference answers' on the sweep's items, not that of running text. As in
SLEB the first and the last layer stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from vllm_adaskip.lab.evaluation.results import SweepCell
from vllm_adaskip.lab.evaluation.sweep import Damage, overall
from vllm_adaskip.lab.fitting import greedy

#: How many layers stay at each end.
PROTECTED = 1
#: The model's loss under a damage; `LookupError`: not known.
Loss = Callable[[Damage], float]


@dataclass(frozen=True)
class Step:
    """One layer deleted after those of the steps before.

    Attributes:
        deleted: all layers deleted so far, in this order.
        loss: without them.

    """

    deleted: tuple[int, ...]
    loss: float

    @property
    def damage(self) -> Damage:
        """The deletion as the sweep stores it: sorted, as the order of deleting does not matter."""
        return Damage("delete", tuple(sorted(self.deleted)))


def sleb_order(
    loss: Loss, num_layers: int, steps: int, protected: int = PROTECTED
) -> Iterator[Step]:
    """Delete ``steps`` layers greedily; of equal losses the lowest layer goes.

    Args:
        loss: asked once for each layer that is left, at each step.
        num_layers: of the model.
        steps: at most so many layers are deleted.
        protected: this many first layers stay, and as many last ones.

    """

    def without(layers: tuple[int, ...]) -> float:
        return loss(Step(layers, 0.0).damage)

    candidates = range(protected, num_layers - protected)
    for step in greedy.greedy(without, candidates, min(steps, num_layers - 1)):
        yield Step(step.left_out, step.loss)


def stored_order(
    cells: Iterable[SweepCell], num_layers: int, protected: int = PROTECTED
) -> Iterator[Step]:
    """Return the steps that a results folder holds, as far as all of a step's trials are there."""
    found: dict[Damage, list[SweepCell]] = {}
    for cell in cells:
        found.setdefault(Damage(cell.kind, tuple(cell.layers)), []).append(cell)
    steps = sleb_order(lambda damage: overall(found[damage])[1], num_layers, num_layers, protected)
    try:
        yield from steps
    except LookupError:
        return


def trials(num_layers: int, steps: int, protected: int = PROTECTED) -> int:
    """Count the losses that `sleb_order` asks for."""
    candidates = max(num_layers - 2 * protected, 0)
    return greedy.trials(candidates, min(steps, num_layers - 1))
