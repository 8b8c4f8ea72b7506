# SPDX-License-Identifier: Apache-2.0
"""The ways to run a model that are compared: dense, plans, families of plans, methods."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from math import ceil
from typing import Any

from vllm_adaskip import old_names
from vllm_adaskip.classifiers import METHODS, SkipPlan, method_of
from vllm_adaskip.classifiers.hub import located
from vllm_adaskip.classifiers.profile import ADAPTER, Profile
from vllm_adaskip.engine.prompt_plan import as_tail, exit_plan
from vllm_adaskip.lab import fixed_plans
from vllm_adaskip.lab.evaluation.results import Setting

DENSE = Setting(name="dense", family="dense", skip=[])

#: Families of fixed plans: what every adaptive method has to beat.
PLAN_FAMILIES = ("uniform", "random", "exit")


def uniform(num_layers: int, left_out: int) -> list[int | str]:
    """Leave out layers evenly spaced between the first and the last, which stay."""
    return [*fixed_plans.evenly(range(1, num_layers - 1), left_out)]


def at_random(num_layers: int, left_out: int, seed: int) -> list[int | str]:
    """Leave out any layers between the first and the last, which stay."""
    return [*fixed_plans.at_random(range(1, num_layers - 1), left_out, seed)]


def early_exit(num_layers: int, left_out: int) -> list[int | str]:
    """Run the first layers only (early exit at one depth for all)."""
    return [*range(num_layers - left_out, num_layers)]


def plans(
    families: Iterable[str], budgets: Iterable[float], num_layers: int, *, draws: int, seed: int
) -> Iterator[Setting]:
    """Return fixed plans of whole layers that keep at most each budget.

    Args:
        families: some of `PLAN_FAMILIES`.
        budgets: shares of compute to keep, in (0, 1].
        num_layers: of the model.
        draws: how many random plans for each budget.
        seed: of the random plans.

    """
    for budget in budgets:
        left_out = min(num_layers - 2, ceil((1 - budget) * num_layers - 1e-9))
        if left_out == 0:
            continue
        kept = num_layers - left_out
        for family in families:
            if family == "random":
                for draw in range(draws):
                    skip = at_random(num_layers, left_out, seed + draw)
                    name = f"random {kept}/{num_layers} #{draw}"
                    yield Setting(name=name, family=family, skip=skip)
                continue
            skip = {"uniform": uniform, "exit": early_exit}[family](num_layers, left_out)
            yield Setting(name=f"{family} {kept}/{num_layers}", family=family, skip=skip)


def explicit(skip: list[int | str], num_layers: int) -> Setting:
    """Return the setting of one plan that the user names (`PlanError` if it cannot run)."""
    plan = SkipPlan.parse(skip, num_layers)
    return Setting(name=str(plan), family="plan", skip=plan.entries())


def shortened(exits: Iterable[int], tail: int, num_layers: int) -> Iterator[Setting]:
    """Return the settings in which a prompt's tokens, but the last, stop after some layers.

    Raises:
        PlanError: the model has not so many layers.

    """
    for layers in exits:
        exit_plan(layers, num_layers)
        name = f"prompts to {layers}/{num_layers}, tail {tail}"
        prompt = {"exit": layers, "tail": as_tail(tail)}
        yield Setting(name=name, family="prompts", skip=[], prompt=prompt)


def decided(method: str, options: dict[str, Any], budgets: Iterable[float]) -> Iterator[Setting]:
    """Return a method at each budget.

    Raises:
        ValueError: no such method.

    """
    method = old_names.method(method)
    method_of(method)
    for budget in budgets:
        yield Setting(
            name=f"{method} {budget:g}",
            family=method,
            method=method,
            options=options,
            budget=budget,
        )


def profiled(
    name: str, budgets: Iterable[float], targets: Iterable[float], model: str
) -> Iterator[Setting]:
    """Return a profile by itself, at each budget below its own, and at each target.

    Args:
        name: its folder or hub id; what it says of prompts is for all, however short.
        budgets: shares of compute that no sequence may exceed, in (0, 1].
        targets: shares of layers to leave out on average, in [0, 1).
        model: fingerprint of the model that is evaluated.

    Raises:
        ProfileError: no profile, or one that was made for another model.
        ValueError: its method is not one of ours, or has no such targets.

    """
    profile = Profile.load(located(name))
    profile.check_fingerprint(model)
    if profile.method not in METHODS:
        raise ValueError(
            f"{name}: a profile for method {profile.method!r:.200}; allowed: {', '.join(METHODS)}, "
            "or --method and --options for one of your own"
        )
    own = Setting(
        name=name,
        family=name,
        method=profile.method,
        options={"profile": name},
        budget=profile.max_compute,
        prompt={key: value for key, value in profile.prompt.items() if key != "from"},
    )
    yield own
    for budget in budgets:
        has_others = profile.method != "static" or "ladder" in profile.options
        if budget < profile.max_compute and has_others:
            yield own.model_copy(update={"name": f"{name} {budget:g}", "budget": budget})
    for target in targets:
        if "target_skip" not in METHODS[profile.method].Options.model_fields:
            raise ValueError(f"--target-skip: method {profile.method!r} of {name} has no target")
        options = {"profile": name, "target_skip": target}
        yield own.model_copy(update={"name": f"{name} -{target:.0%}", "options": options})


def adapters_alone(settings: Iterable[Setting]) -> Iterator[Setting]:
    """Return each profile with an adapter once more with nothing left out, beside its others."""
    for _, same in groupby(settings, key=lambda one: str(one.options)):
        own = [*same]
        yield from own
        if own[0].options.keys() == {"profile"} and is_adapted(own[0]):
            told: dict[str, Any] = {"skip": [], "prompt": {}}
            name = f"{own[0].name}, nothing left out"
            yield own[0].model_copy(update={"name": name, **told})


def is_adapted(setting: Setting) -> bool:
    """Return whether a setting's profile has LoRA, by which its engine is not the model's own."""
    profile = setting.options.get("profile")
    if profile is None or not (located(profile) / ADAPTER).exists():
        return False
    return Profile.load(located(profile)).adapter == "merged"


def distinct(settings: Iterable[Setting]) -> list[Setting]:
    """Drop settings that come twice, in order; dense comes first, once."""
    found = {DENSE.name: DENSE}
    for setting in settings:
        found.setdefault(setting.name, setting)
    return list(found.values())
