# SPDX-License-Identifier: Apache-2.0
"""Makes a run's manifest: the model, the settings, and what they ran on."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vllm_adaskip.classifiers.profile import fingerprint
from vllm_adaskip.lab.evaluation.results import Manifest, Results, ResultsError, Setting

_PACKAGES = ("vllm-adaskip", "vllm", "torch", "transformers", "numpy", "scipy", "lm-eval")


def new_manifest(
    *,
    command: str,
    model: str,
    data: dict[str, Any],
    engine: dict[str, Any],
    settings: Sequence[Setting],
    seed: int,
) -> Manifest:
    """Describe a run that starts now; reads the model's config, not its weights."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).to_dict()
    return Manifest(
        command=command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=model,
        fingerprint=fingerprint(config),
        num_layers=config["num_hidden_layers"],
        data=data,
        engine=engine,
        settings=list(settings),
        seed=seed,
        versions=_versions(),
        hardware=_hardware(),
        commit=_commit(),
    )


def start_or_resume(results: Results, manifest: Manifest) -> Manifest:
    """Write the manifest of a new run, or check that an earlier one may go on.

    Settings may be added to a run; model, data, vLLM's options and seed may not change.

    Raises:
        ResultsError: the folder holds another run.

    """
    if not (results.folder / "manifest.json").exists():
        results.write_manifest(manifest)
        return manifest
    earlier = results.manifest()
    for key in ("fingerprint", "data", "engine", "seed"):
        old, new = getattr(earlier, key), getattr(manifest, key)
        if key == "engine" and not (old and new):
            continue  # a sweep runs without vLLM, in the folder of a run with it
        if old != new:
            raise ResultsError(
                f"{results.folder} holds another run: its {key} is {old!r:.120}, not {new!r:.120}; "
                "use another --out, or the same arguments"
            )
    known = {setting.name: setting for setting in earlier.settings}
    for setting in manifest.settings:
        if known.setdefault(setting.name, setting) != setting:
            raise ResultsError(
                f"{results.folder} holds another setting named {setting.name!r}; use another --out"
            )
    merged = earlier.model_copy(
        update={"engine": earlier.engine or manifest.engine, "settings": list(known.values())}
    )
    results.write_manifest(merged)
    return merged


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _hardware() -> dict[str, Any]:
    processor = platform.processor() or platform.machine()
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    return {"processor": processor, "cores": os.cpu_count(), "system": platform.platform()}


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _commit() -> str | None:
    """Give the commit of the checkout this runs from; None for an installed package."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
