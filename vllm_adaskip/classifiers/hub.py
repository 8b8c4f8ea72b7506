# SPDX-License-Identifier: Apache-2.0
"""Where profiles lie: a folder, or a repository of the Hugging Face hub, like any adapter."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from vllm_adaskip.classifiers.profile import FILE, Profile, ProfileError, refuse_special

#: What a profile may hold; nothing else is downloaded or published, pickles in particular.
CONTENTS = [FILE, "*.safetensors", "lora/adapter_config.json", "lora/*.safetensors"]
#: What `adaskip scan` measured, in words.
_NAMES = {
    "agreement": "share of answer tokens that stay the whole model's (95% interval)",
    "surprise": "nats a token by which the whole model prefers its own",
    "time_ratio_batch_1": "time against compiled stock vLLM, batch 1 (95% of the median)",
    "time_ratio_batch_16": "time against compiled stock vLLM, batch 16 (95% of the median)",
    "vllm": "vLLM",
}
_HUB_ID = re.compile(r"([\w.-]{1,96}/[\w.-]{1,96})(?:@([\w./-]{1,96}))?", re.ASCII)


def located(name: str) -> Path:
    """Return a profile's folder, downloaded if it is a hub id (``org/name``, ``org/name@tag``).

    Raises:
        ProfileError: neither a folder nor a hub id, the hub does not give it, or what it should
            hold is no regular file.

    """
    if os.path.isdir(name):  # unlike Path, which takes "" for "." and raises if it is too long
        return _of_files(Path(name))
    match = _HUB_ID.fullmatch(name)
    if match is None:
        raise ProfileError(
            f"profile {name!r:.200} is no folder; allowed: a folder, or a hub id such as "
            "'org/name' or 'org/name@revision'"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(match[1], revision=match[2], allow_patterns=CONTENTS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ProfileError(f"profile {name!r:.200}: no such folder, and the hub: {error}") from None


def _of_files(folder: Path) -> Path:
    """Return a profile's folder if all that is read of it, or published, are regular files."""
    for pattern in CONTENTS:
        for path in folder.glob(pattern):
            refuse_special(path)
    return folder


def publish(folder: Path, repo: str, *, private: bool = False) -> str:
    """Put a profile into a hub repository, made if there is none, with a card; give its address.

    Needs a token, as `huggingface_hub` finds it (``hf auth login``, ``HF_TOKEN``).

    Raises:
        ProfileError: the folder is no profile.

    """
    from huggingface_hub import HfApi

    card = _card(Profile.load(_of_files(folder)), repo)
    api = HfApi()
    address = api.create_repo(repo, private=private, exist_ok=True)
    api.upload_folder(
        repo_id=repo,
        folder_path=folder,
        allow_patterns=CONTENTS,
        commit_message="Upload a vllm-adaskip profile",
    )
    api.upload_file(
        repo_id=repo,
        path_or_fileobj=card.encode(),
        path_in_repo="README.md",
        commit_message="Describe the profile",
    )
    return str(address)


def _card(profile: Profile, repo: str) -> str:
    """Describe a profile as the hub shows it."""
    # The model may have been a local folder, which is nobody else's business and no hub id.
    base = profile.model if _HUB_ID.fullmatch(profile.model) else None
    header = [
        "---",
        "library_name: vllm-adaskip",
        *([f"base_model: {base}"] if base else []),
        "---",
    ]
    serve = f"vllm serve --model {base or 'MODEL'} --plugin adaskip"
    lines = [
        *header,
        f"# {repo}\n",
        f"A profile of vllm-adaskip: method `{profile.method}`,",
        f"for models with fingerprint `{profile.fingerprint}`.\n",
        f"    {serve} --additional-config.adaskip.profile {repo}\n",
    ]
    told = dict(profile.metrics)
    if base is None:
        for private in ("model", "command"):
            told.pop(private, None)
    if told:
        lines += ["| figure | value |", "|---|---|"]
        lines += [f"| {cell(name)} | {cell(value)} |" for name, value in readable(told)]
    return "\n".join(lines) + "\n"


def readable(metrics: Mapping[str, float | int | str]) -> Iterator[tuple[str, str]]:
    """Return figures as people read them: names in words, an interval beside its figure."""
    for key, value in metrics.items():
        whole = key.removesuffix("_low").removesuffix("_high")
        if whole != key and whole in metrics:
            continue
        ends = [metrics.get(f"{key}{end}") for end in ("_low", "_high")]
        interval = f" ({ends[0]} to {ends[1]})" if None not in ends else ""
        yield _NAMES.get(key, key.replace("_", " ")), f"{value}{interval}"


def cell(text: str) -> str:
    """Return text as one cell of a Markdown table, in which nothing is a mark."""
    plain = " ".join(text.split())
    return re.sub(r"([\\`*_{}\[\]<>()#|~!&])", r"\\\1", plain)
