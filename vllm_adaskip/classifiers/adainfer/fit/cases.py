# SPDX-License-Identifier: Apache-2.0
"""What a frozen model would say after each layer, on examples: features and labels of AdaInfer.

One forward of the whole model shows all depths, as no layer sees those above it. After every layer
the stream goes through final norm and head; features are `lens_gate.features`, the same function
that a server uses, and the label is the paper's (arXiv 2403.02181): is the likeliest token the one
that the whole model finds likeliest? That is the token a server would go on with, so it is always
looked for in the full vocabulary, whatever the features are computed over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_adaskip.classifiers.adainfer.fit.head import FinalHead
from vllm_adaskip.classifiers.adainfer.gate import features
from vllm_adaskip.lab.fitting.samples import Batch, Sample, answer_logits, batches_of
from vllm_adaskip.lab.fitting.sub_layers import visited

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Scope = Literal["answer", "prompt", "token"]

#: Positions whose logits are held at once.
_ROWS = 256


@dataclass(frozen=True)
class Cases:
    """Decisions that a server would take, each with what it would see and what would come of it.

    Attributes:
        features: ``[cases, num_layers, 2]`` ``top_prob`` and ``gap`` after each layer.
        agrees: ``[cases, num_layers]`` whether stopping there changes nothing; True at the last.
        right: ``[cases, num_layers]`` whether what is said then is the example's answer, which may
            begin in any of its forms (`Sample.begins`).
        samples: ``[cases]`` the example of each.
        tasks: ``[cases]`` its task.
        passes: ``[cases]`` forwards that are shorter if it stops: 1, but of scope ``prompt`` the
            tokens of the answer that are decoded.

    """

    features: Floats
    agrees: Bools
    right: Bools
    samples: NDArray[np.int64]
    tasks: NDArray[np.str_]
    passes: NDArray[np.int64]

    def __len__(self) -> int:
        """Count them."""
        return len(self.samples)

    def of(self, chosen: NDArray[Any]) -> Cases:
        """Return some of them, by mask or index."""
        return Cases(**{name: values[chosen] for name, values in vars(self).items()})


def exit_candidates(samples: Sequence[Sample], scope: Scope) -> list[int]:
    """Return the tokens that answers have where the scope looks: their first, or all others."""
    if scope == "token":
        return sorted(
            {token for one in samples for token in one.ids[len(one.ids) - one.answer + 1 :]}
        )
    return sorted({token for one in samples for token in (one.ids[-one.answer], *one.begins)})


@torch.no_grad()
def exit_cases(
    model: Any,
    head: FinalHead,
    samples: Sequence[Sample],
    scope: Scope,
    batch: int,
    done: Callable[[int], None],
    candidates: Sequence[int] | None = None,
) -> Cases:
    """Watch a model of transformers; ``done`` is told how many more samples are.

    A case is, by scope: ``answer``, the last token of a prompt, which decides about the answer's
    first; ``prompt``, the same token, which decides about all others, so that all have to agree;
    ``token``, each token of the answer that is fed. All are fed with the example's answer. That a
    token that has stopped leaves no keys of its own in deeper layers is not seen.

    Raises:
        ValueError: no case, as all answers are of one token.

    """
    found = []
    for places, one in batches_of(samples, batch, model.device):
        looks = _looks(model, head, one, scope, candidates)
        own = [samples[place] for place in places]
        found.append(_cases(looks, one, np.array(places), own, scope))
        done(len(places))
    whole = {name: np.concatenate([vars(one)[name] for one in found]) for name in vars(found[0])}
    if not len(cases := Cases(**whole)):
        raise ValueError(
            f"scope {scope!r}: all answers are of one token, which the prompt gives; allowed: "
            "longer ones, or scope 'answer'"
        )
    return cases.of(np.argsort(cases.samples, kind="stable"))


@dataclass(frozen=True)
class _Looks:
    """What was seen at positions of a batch, in their order row by row, after each layer.

    Attributes:
        at: ``[rows, tokens - 1]`` which positions.
        features: ``[positions, num_layers, 2]``.
        best: ``[positions, num_layers]`` likeliest tokens.

    """

    at: Bools
    features: Floats
    best: NDArray[np.int64]


def _looks(
    model: Any, head: FinalHead, batch: Batch, scope: Scope, candidates: Sequence[int] | None
) -> _Looks:
    at = batch.answer[:, 1:]  # those that have a token of the answer to say
    if scope != "prompt":
        at = at & (batch.prompt if scope == "answer" else batch.answer)[:, :-1]
    found: list[tuple[Tensor, Tensor]] = []

    def look(sub_layer: int, before: Tensor, update: Tensor) -> Tensor:
        if sub_layer % 2:
            found.append(_look(head, (before + update)[:, :-1][at], candidates))
        return update

    with visited(model, look):
        answer_logits(model, batch)
    seen, best = (torch.stack(each, dim=1).numpy(force=True) for each in zip(*found, strict=True))
    return _Looks(at.numpy(force=True), seen.astype(np.float64), best)


def _look(
    head: FinalHead, stream: Tensor, candidates: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    """Return features and likeliest tokens of ``[positions, hidden]``."""
    seen, best = [], []
    for part in torch.split(stream, _ROWS):
        logits = head.logits(part)
        best.append(logits.argmax(-1))
        seen.append(features(logits if candidates is None else logits[:, list(candidates)]))
    return torch.cat(seen), torch.cat(best)


def _cases(
    looks: _Looks,
    batch: Batch,
    places: NDArray[np.int64],
    samples: Sequence[Sample],
    scope: Scope,
) -> Cases:
    labels = batch.labels.numpy(force=True)[looks.at]
    agrees = looks.best == looks.best[:, -1:]
    right = looks.best == labels[:, None]
    row = np.nonzero(looks.at)[0]
    first = np.diff(row, prepend=-1) > 0
    starts = np.flatnonzero(first)
    if scope != "token":  # which begins with the answer's second token
        for start in starts:
            right[start] |= np.isin(looks.best[start], [*samples[row[start]].begins])
    passes = np.ones(len(row), dtype=np.int64)
    seen = looks.features
    if scope == "prompt":
        agrees[first] = True  # said by the prompt, at full depth
        right[first] = right[first][:, -1:]
        agrees = np.logical_and.reduceat(agrees, starts)
        right = np.logical_and.reduceat(right, starts)
        passes = np.add.reduceat(passes, starts) - 1
        seen, row = seen[first], row[first]
    tasks = np.array([one.task for one in samples], dtype=np.str_)
    cases = Cases(seen, agrees, right, places[row], tasks[row], passes)
    return cases.of(cases.passes > 0)
