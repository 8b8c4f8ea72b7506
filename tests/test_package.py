# SPDX-License-Identifier: Apache-2.0
"""The package as it is installed: names, entry points, weight of an import, wheel."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution, entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(code: str) -> str:
    """Run code in a fresh interpreter, away from the repository."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_is_light() -> None:
    heavy = "[name for name in ('torch', 'vllm', 'transformers', 'numpy') if name in sys.modules]"
    assert run(f"import sys, vllm_adaskip, vllm_adaskip.plugin; print({heavy})") == "[]"


def test_the_command_line_loads_nothing_heavy_before_it_must() -> None:
    """A command sets the number of threads before torch is loaded, which reads it only then."""
    heavy = "[name for name in ('torch', 'vllm', 'scipy', 'transformers') if name in sys.modules]"
    assert run(f"import sys, vllm_adaskip.cli.main; print({heavy})") == "[]"


def test_every_entry_point_is_named_adaskip_and_loads() -> None:
    ours = distribution("vllm-adaskip").entry_points
    groups = {point.group for point in ours}
    assert groups == {"console_scripts", "vllm.general_plugins"}
    for point in ours:
        assert point.name == "adaskip"
        assert callable(point.load())


def test_no_entry_point_forces_a_runner_on_other_engines() -> None:
    assert not [p for p in entry_points(group="vllm.logits_processors") if p.name == "adaskip"]


def test_one_name_for_each_package_and_none_that_is_generic() -> None:
    assert (
        run(
            "import vllm_adaskip.classifiers as c, vllm_adaskip.model_executors as m\n"
            "from importlib.util import find_spec\n"
            "print(c.__name__, m.__name__, find_spec('classifiers'), find_spec('model_executors'))"
        )
        == "vllm_adaskip.classifiers vllm_adaskip.model_executors None None"
    )


def test_registering_twice_changes_nothing_and_no_stock_architecture() -> None:
    code = """
from vllm import ModelRegistry
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm_adaskip.plugin import register
stock = dict(ModelRegistry.models), dict(MODELS_CONFIG_MAP)
register()
built = EngineArgs.add_cli_args, EngineArgs.create_engine_config
register()
assert built == (EngineArgs.add_cli_args, EngineArgs.create_engine_config)
for before, after in zip(stock, (ModelRegistry.models, MODELS_CONFIG_MAP)):
    assert all(after[name] is value for name, value in before.items())
    print(sorted(set(after) - set(before)))
"""
    families = ["Gemma3", "Llama", "Mistral", "OPT", "Phi3", "Qwen2", "Qwen3", "Qwen3Moe"]
    ours = [f"AdaSkip{name}ForCausalLM" for name in families]
    names = str(ours)
    assert run(code).splitlines()[-2:] == [names, names]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy, because setuptools builds beside the sources and keeps what it built before.
    source = folder / "source"
    leave_out = shutil.ignore_patterns(".*", "build", "*.egg-info", "tests")
    shutil.copytree(ROOT, source, symlinks=True, ignore=leave_out)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(source)],
        check=True,
    )
    return zipfile.ZipFile(next(folder.glob("vllm_adaskip-*.whl")))


def test_the_wheel_holds_every_module_and_the_bundled_model(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    sources = (ROOT / "vllm_adaskip").rglob("*.py")
    modules = {str(path.relative_to(ROOT)) for path in sources}
    assert modules == {name for name in names if name.endswith(".py")}
    assert "vllm_adaskip/lab/testbed/model/model.safetensors" in names
    assert "vllm_adaskip/py.typed" in names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"vllm_adaskip"}


def test_nothing_that_serves_can_unpickle_or_run_what_it_reads() -> None:
    """Training, in the testbed, may read its own checkpoints."""
    forbidden = {"pickle", "cloudpickle", "dill", "joblib", "skops", "marshal", "shelve"}
    sources = [*(ROOT / "vllm_adaskip").rglob("*.py")]
    writer = ROOT / "vllm_adaskip/classifiers/adainfer/fit/svm.py"
    assert len(sources) > 25
    for path in sources:
        if "testbed" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                if path == writer and ast.unparse(node) == "from skops.io import dump":
                    continue  # a fit keeps what it trained, and nothing reads it again
                module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                assert (module or "").split(".")[0] not in forbidden, path
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("eval", "exec", "torch.load"), path
