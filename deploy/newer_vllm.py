# SPDX-License-Identifier: Apache-2.0
"""Put a vLLM release without a CPU build beside the installed one: its Python over those kernels.

CPU builds come later than releases. The Python of the next one runs with them, but for what calls
a kernel whose signature changed. Writes ``build/vllm-RELEASE``, to be named in ``PYTHONPATH``.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: What is taken of a wheel besides Python.
DATA = {".py", ".json", ".jinja"}


def main(release: str) -> None:
    """Download the release, and unpack it without kernels of its own."""
    folder = ROOT / "build" / f"vllm-{release}"
    if (folder / ".ready").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    download = ["download", "-q", "--no-deps", "--only-binary", ":all:", "-d", str(folder)]
    done = subprocess.run([sys.executable, "-m", "pip", *download, f"vllm=={release}"], check=False)
    if done.returncode:
        sys.exit(f"newer_vllm: pip has no wheel of vllm {release} for this machine")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        for name in packed.namelist():
            if name.startswith("vllm/") and Path(name).suffix in DATA:
                packed.extract(name, folder)
    wheel.unlink()
    installed = Path(sysconfig.get_path("purelib")) / "vllm"
    for kernels in installed.glob("*.so"):
        shutil.copy(kernels, folder / "vllm")
    (folder / ".ready").touch()


if __name__ == "__main__":
    main(sys.argv[1])
