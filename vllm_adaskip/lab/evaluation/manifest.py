# SPDX-License-Identifier: Apache-2.0
"""Makes a run's manifest: the model, the settings, and what they ran on."""

from __future__ import annotations

import os
import platform
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vllm_adaskip.classifiers.hub import CONTENTS, located
from vllm_adaskip.classifiers.profile import fingerprint
from vllm_adaskip.lab import digest
from vllm_adaskip.lab.data.items import Item
from vllm_adaskip.lab.evaluation.results import Manifest, Results, ResultsError, Setting

#: Packages that decide answers and scores.
_DECIDING = (
    *("vllm-adaskip", "vllm", "torch", "transformers", "tokenizers"),
    *("lm-eval", "rouge-score", "sacrebleu"),
)
_OTHERS = ("numpy", "scipy")
#: Of the hardware, what decides times; the operating system's release does not.
_MACHINE = ("processor", "cores", "threads", "accelerators")

#: Of fewer items the labels' frequencies say nothing.
_LABELS = 10


def new_manifest(
    *,
    command: str,
    model: str,
    data: dict[str, Any],
    engine: dict[str, Any],
    settings: Sequence[Setting],
    seed: int,
) -> Manifest:
    """Describe a run that starts now; its questions are added by `asking`."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    facts = config.to_dict()
    return Manifest(
        command=command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=model,
        fingerprint=fingerprint(facts),
        num_layers=facts["num_hidden_layers"],
        data=data,
        engine=engine,
        settings=list(settings),
        seed=seed,
        inputs={"model files": digest.of_model(model, digest.commit_of(config))},
        versions=_versions(),
        hardware=_hardware(),
        commit=_commit(),
    )


def asking(
    manifest: Manifest, settings: Sequence[Setting], items: Sequence[Item], **told: str | int | bool
) -> Manifest:
    """Return the manifest with what is asked under which settings, as far as it decides a number.

    ``told`` are more of the command's options that do.
    """
    inputs = {"questions": digest.of_items(items), **told}
    if folder := manifest.data.get("lm_eval_path"):
        inputs["lm-eval tasks"] = digest.of_folder(Path(folder), ["**/*"])
    for name in {str(one.options["profile"]) for one in settings if "profile" in one.options}:
        inputs[f"profile {name}"] = digest.of_folder(located(name), CONTENTS)
    return manifest.model_copy(
        update={
            "settings": list(settings),
            "inputs": manifest.inputs | inputs,
            "chance": chance(items),
            "asked": len(items),
        }
    )


def metrics_of(items: Sequence[Item]) -> str:
    """Return the items' metrics: their names where they are few, else a digest."""
    names = dict.fromkeys(item.metric for item in items)
    return names.popitem()[0] if len(names) == 1 else digest.of_data([one.metric for one in items])


def chance(items: Sequence[Item]) -> dict[str, float]:
    """Return by task what answers without knowledge score, where references repeat or are choices.

    It is the better of the most frequent reference as the answer to all, and of a drawn choice.
    """
    found: dict[str, float] = {}
    for task in dict.fromkeys(item.task for item in items):
        members = [item for item in items if item.task == task]
        labels = Counter(item.references[0].strip().lower() for item in members)
        luck = [labels.most_common(1)[0][1] / len(members)] if len(labels) < len(members) else []
        choices = [len(own) for item in members if (own := item.choices)]
        if len(choices) == len(members):
            luck.append(sum(1 / many for many in choices) / len(members))
        if luck and len(members) >= _LABELS:
            found[task] = max(luck)
    return found


def start_or_resume(results: Results, manifest: Manifest) -> Manifest:
    """Write the manifest of a new run, or check that an earlier one may go on.

    Settings may be added to a run. Nothing that decides a number may change.

    Raises:
        ResultsError: the folder holds another run; the message says in what they differ.

    """
    if not (results.folder / "manifest.json").exists():
        results.write_manifest(manifest)
        return manifest
    earlier = results.manifest()
    if found := list(_differences(earlier, manifest)):
        raise ResultsError(
            f"{results.folder} holds another run: {'; '.join(found)}. Use another --out or the "
            "same arguments, or remove that folder"
        )
    known = {setting.name: setting for setting in earlier.settings}
    for setting in manifest.settings:
        if known.setdefault(setting.name, setting) != setting:
            raise ResultsError(
                f"{results.folder} holds another setting named {setting.name!r}; use another --out"
            )
    merged = earlier.model_copy(
        update={
            "model": manifest.model,  # the same files, perhaps no longer in the earlier place
            "engine": earlier.engine or manifest.engine,
            "inputs": earlier.inputs | manifest.inputs,
            "chance": manifest.chance,
            "asked": manifest.asked,
            "rounds": manifest.rounds or earlier.rounds,
            "settings": list(known.values()),
        }
    )
    results.write_manifest(merged)
    return merged


def _differences(earlier: Manifest, new: Manifest) -> Iterator[str]:
    """Return all that decides a number and differs, with the old and the new value.

    A sweep has no engine and no answers, and may share a folder with a run that has: their
    options differ only where both runs name them. What it reads must be named.
    """
    old, now = _deciding(earlier), _deciding(new)
    for key in {**old, **now}:
        optional = key not in _NAMED and not key.startswith("data ")
        if key.startswith("engine ") and earlier.engine and new.engine:
            optional = False
        if optional and not (key in old and key in now):
            continue
        values = [each.get(key, "not recorded") for each in (old, now)]
        if values[0] != values[1]:
            yield "its {} is {!r:.120}, not {!r:.120}".format(key, *values)


_NAMED = ("fingerprint", "seed", "model files", "questions")


def _deciding(manifest: Manifest) -> dict[str, Any]:
    versions = {
        f"{name} version": version
        for name, version in manifest.versions.items()
        if name in _DECIDING
    }
    machine = {name: value for name, value in manifest.hardware.items() if name in _MACHINE}
    return {
        "fingerprint": manifest.fingerprint,
        "seed": manifest.seed,
        **{f"data {key}": value for key, value in manifest.data.items()},
        **{f"engine {key}": value for key, value in manifest.engine.items()},
        **manifest.inputs,
        **versions,
        **machine,
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in (*_DECIDING, *_OTHERS):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    own = found.get("vllm-adaskip", "not installed")
    return found | {"vllm-adaskip": f"{own} (code {digest.of_code()})"}


def _hardware() -> dict[str, Any]:
    processor = platform.processor() or platform.machine()
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    found: dict[str, Any] = {"processor": processor, "cores": os.cpu_count()}
    found["system"] = platform.platform()
    if threads := os.environ.get("OMP_NUM_THREADS"):
        found["threads"] = threads
    if cards := _accelerators():
        found["accelerators"] = cards
    return found


def _accelerators() -> list[str]:
    """Return the names of NVIDIA's cards, without a start of CUDA in this process."""
    cards = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    lines = (line for card in cards for line in _read(card).splitlines())
    return [line.partition(":")[2].strip() for line in lines if line.startswith("Model")]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _commit() -> str | None:
    """Return the commit of the checkout this runs from; None for an installed package."""
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
