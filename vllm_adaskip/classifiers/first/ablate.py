# SPDX-License-Identifier: Apache-2.0
"""What in FiRST does the work: the settings that reviewers of arXiv 2410.12513 asked to compare.

Routers against random plans and against the best fixed plan at equal compute, with LoRA and LoRA
without any skipping, and the routers' own choices: how scores are reduced, and the codebook.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vllm_adaskip.classifiers.first.method import FirstOptions
from vllm_adaskip.classifiers.profile import Profile
from vllm_adaskip.lab.evaluation.results import Setting
from vllm_adaskip.lab.evaluation.settings import DENSE, distinct, plans
from vllm_adaskip.lab.fitting.greedy import greedy

Reduce = Literal["mean", "fraction", "last"]
REDUCES: tuple[Reduce, ...] = ("mean", "fraction", "last")
BOOKS = (0, 2, 4, 8, 16)
TUNED, BEST = "LoRA, nothing skipped", "best fixed"
#: ``[prompts, layers]`` reduced scores, and how much each prompt counts.
Weighted = tuple[NDArray[np.float64], NDArray[np.float64]]
#: Gives what routers say of training and of held-back prompts.
Scored = Callable[[Reduce], tuple[Weighted, Weighted]]


@dataclass(frozen=True)
class Fits:
    """The profiles of an ablation.

    Attributes:
        routers: one for each seed.
        adapted: the first with LoRA trained under the routers' decisions.
        tuned: LoRA trained and served with nothing skipped.
        variants: of the first seed's routers, by what is different.

    """

    routers: Sequence[Path]
    adapted: Path
    tuned: Path
    variants: dict[str, Path]


def settings(
    fits: Fits, fixed: dict[int, list[int | str]], targets: Sequence[float], num_layers: int
) -> list[Setting]:
    """Return everything that is compared, dense first; families are what is averaged over seeds."""

    def routed() -> Iterator[Setting]:
        for target in targets:
            for family, folders in (("routers", fits.routers), ("routers + LoRA", [fits.adapted])):
                for seed, folder in enumerate(folders):
                    yield _at(family, f" #{seed}", folder, target)
        for variant, folder in fits.variants.items():  # where differences show most
            yield _at(variant, "", folder, max(targets))

    shares = [1 - target for target in targets]
    same_compute = plans(["uniform", "random"], shares, num_layers, draws=3, seed=0)
    best = (
        Setting(name=f"{BEST} {num_layers - count}/{num_layers}", family=BEST, skip=skip)
        for count, skip in fixed.items()
    )
    tuned = Setting(name=TUNED, family=TUNED, options={"profile": str(fits.tuned)}, skip=[])
    return distinct([DENSE, *routed(), *same_compute, *best, tuned])


def _at(family: str, seed: str, folder: Path, target: float) -> Setting:
    """Return a profile's routers at a share left out on average."""
    options = {"profile": str(folder), "target_skip": target}
    name = f"{family}{seed} -{target:.0%}"
    return Setting(name=name, family=family, method="first", options=options)


def best_fixed(
    loss: Callable[[Sequence[int]], float], counts: Sequence[int], num_layers: int
) -> dict[int, list[int | str]]:
    """Return, for each number of layers, the greedily best plan (SLEB, arXiv 2402.09025).

    The first and the last layer stay.

    Args:
        loss: of the answers, with these layers left out after the prompt.
        counts: how many layers are left out.
        num_layers: of the model.

    """
    steps = list(greedy(loss, range(1, num_layers - 1), max(counts)))
    return {count: [*sorted(steps[count - 1].left_out)] for count in counts}


def variants(profile: Path, scored: Scored, folder: Path) -> dict[str, Path]:
    """Write a profile's variants: other ways to reduce scores, other codebooks; each calibrated.

    Args:
        profile: with routers and no adapter.
        scored: what its routers say of the fit's prompts, by how it is reduced.
        folder: where they go.

    """
    from vllm_adaskip.classifiers.first.fit.fitted import with_codebook
    from vllm_adaskip.classifiers.first.fit.settings import FirstSettings
    from vllm_adaskip.classifiers.first.fit.thresholds import with_thresholds

    original = Profile.load(profile)
    options = FirstOptions.model_validate(original.options)
    size = len(options.codebook)
    wanted: list[tuple[str, Reduce, int]] = [
        *((f"reduce {each}", each, size) for each in REDUCES),
        *((f"codebook {each}" if each else "no codebook", options.reduce, each) for each in BOOKS),
    ]
    found = {}
    for name, reduce, plans_in_book in wanted:
        method = FirstOptions(
            reduce=reduce, keep_first=options.keep_first, keep_last=options.keep_last
        )
        told = FirstSettings(method=method, codebook=plans_in_book)
        training, held_back = scored(reduce)
        with_book = with_codebook(told, *training)
        complete = with_thresholds(with_book, *held_back, told.target_skip)
        found[name] = folder / name.replace(" ", "-")
        shutil.copytree(profile, found[name], dirs_exist_ok=True)
        changed = complete.model_dump(exclude_defaults=True)
        original.model_copy(update={"options": changed, "metrics": {}}).save(found[name])
    return found
