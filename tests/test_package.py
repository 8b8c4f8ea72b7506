# SPDX-License-Identifier: Apache-2.0
"""The package as it is installed: names, entry points, weight of an import, wheel."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import distribution, entry_points
from pathlib import Path

import httpx
import pytest
from helpers.http_server import URL, serving
from helpers.readme import ROOT

from vllm_adaskip import __version__, bundled_model


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


@pytest.mark.engine
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


def tree(folder: Path, *more: str) -> Path:
    """Copy the sources, because setuptools builds beside them and keeps what it built before."""
    leave_out = shutil.ignore_patterns(
        ".git", ".venv*", ".*_cache", ".hypothesis", "__pycache__", "build", "*.egg-info", *more
    )
    shutil.copytree(ROOT, folder, symlinks=True, ignore=leave_out)
    return folder


def build(source: Path, folder: Path) -> zipfile.ZipFile:
    """Build the wheel of a folder or an sdist by this environment's setuptools."""
    folder.mkdir()
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(folder), str(source)], check=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpack the sdist."""
    folder = tmp_path_factory.mktemp("sdist")
    source = tree(folder / "source")
    code = "from setuptools.build_meta import build_sdist; build_sdist('..')"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (packed,) = folder.glob("vllm_adaskip-*.tar.gz")
    with tarfile.open(packed) as tar:
        tar.extractall(folder / "sdist", filter="data")
    return next((folder / "sdist").iterdir())


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> zipfile.ZipFile:
    """Build it from the sdist, as whoever has no wheel does."""
    return build(sdist, sdist.parent / "wheel")


@pytest.fixture(scope="module")
def lab_wheel(sdist: Path) -> zipfile.ZipFile:
    return build(sdist / "deploy" / "lab-data", sdist.parent / "lab-wheel")


@pytest.fixture(scope="module")
def site(wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel alone, without the laboratory's data."""
    folder = tmp_path_factory.mktemp("site")
    wheel.extractall(folder)
    return folder


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="what belongs to it is what git has")
def test_the_sdist_is_the_whole_repository(sdist: Path) -> None:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    paths = [path for path in done.stdout.splitlines() if (ROOT / path).is_file()]
    tracked = {path for path in paths if not path.startswith(".")}
    assert len(tracked) > 300
    assert not {path for path in tracked if not (sdist / path).is_file()}


def test_a_servers_wheel_holds_every_module_and_no_data(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    sources = (ROOT / "vllm_adaskip").rglob("*.py")
    modules = {str(path.relative_to(ROOT)) for path in sources}
    assert modules == {name for name in names if name.endswith(".py")}
    assert {"vllm_adaskip/py.typed", "vllm_adaskip/lab/evaluation/page.html.jinja"} <= names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"vllm_adaskip"}
    suffixes = {Path(name).suffix for name in names if name.startswith("vllm_adaskip/")}
    assert suffixes == {".py", ".typed", ".jinja"}
    assert wheel.filename is not None and Path(wheel.filename).stat().st_size < 1_000_000


def test_the_laboratorys_wheel_holds_all_its_data_and_has_the_versions_that_go_together(
    lab_wheel: zipfile.ZipFile,
) -> None:
    lab = ROOT / "vllm_adaskip" / "lab"
    folders = [lab / "profiles", lab / "testbed" / "model", lab / "testbed" / "profiles"]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    names = {name for name in lab_wheel.namelist() if ".dist-info" not in name}
    assert names == {f"vllm_adaskip_lab/{path.relative_to(lab)}" for path in files}
    needs = distribution("vllm-adaskip").requires or []
    (pin,) = [need.partition(";")[0].strip() for need in needs if "vllm-adaskip-lab" in need]
    version = Path(lab_wheel.filename or "").name.split("-")[1]
    assert pin == f"vllm-adaskip-lab=={version}" and version == __version__


def test_a_server_does_without_the_laboratorys_data_and_its_commands_say_what_is_missing(
    site: Path, lab_wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    code = f"""
import sys; sys.path.insert(0, {str(site)!r})
from vllm_adaskip.bundled import bundled_model, bundled_profile, is_bundled
from vllm_adaskip.cli.serve import serve_arguments
from vllm_adaskip.lab.models import get
assert bundled_model.__globals__["__file__"].startswith({str(site)!r})
assert serve_arguments(["m"])[:2] == ["serve", "m"] and not is_bundled("m")
missing = (lambda: serve_arguments([]), lambda: bundled_profile("first"), lambda: get("bundled"),
           lambda: get("smollm2-healed"))
for ask in missing:
    try:
        print(ask())
    except FileNotFoundError as error:
        print(error)
"""
    said = run(code).splitlines()
    assert len(said) == 4 and all('pip install "vllm-adaskip[lab]"' in line for line in said)
    lab_wheel.extractall(tmp_path)
    said = run(code.replace("sys;", f"sys; sys.path.append({str(tmp_path)!r});")).splitlines()
    assert len(said) == 4
    (model,) = (tmp_path / "vllm_adaskip_lab").glob("*/model")
    assert f"'{model}'" in said[0] and said[2] == str(model)
    assert all((Path(profile) / "adaskip.json").is_file() for profile in (said[1], said[3]))


@pytest.mark.engine
def test_the_wheel_alone_starts_a_server(site: Path, tmp_path: Path) -> None:
    """For a model that is no business of the package; and its report is there."""
    model = shutil.copytree(bundled_model(), tmp_path / "model")
    command = f"adaskip serve {model} --enforce-eager --max-model-len 64"
    with serving(command, tmp_path / "log", cwd=tmp_path, more={"PYTHONPATH": str(site)}):
        (worker,) = httpx.get(f"{URL}/adaskip/report").json()
        code = f"import sys; sys.path.insert(0, {str(site)!r}); import vllm_adaskip as a; print(a)"
        assert str(site) in run(code)
    assert worker["num_layers"] == 12 and worker["decode_tokens"] == 0


@pytest.mark.parametrize(
    ("lose", "words"),
    [
        ("link", "classifiers should be a symbolic link to vllm_adaskip/classifiers"),
        ("copy", "model_executors should be a symbolic link to vllm_adaskip/model_executors"),
        ("method", "vllm_adaskip/classifiers/first/method.py is missing"),
        ("family", "vllm_adaskip/model_executors/llama.py is missing"),
        ("all", "vllm_adaskip/classifiers/methods.py is missing"),
    ],
)
def test_nothing_is_built_from_sources_of_which_something_was_lost(
    tmp_path: Path, lose: str, words: str
) -> None:
    source = tree(tmp_path / "source", "*.safetensors", "docs", "tests")
    package = source / "vllm_adaskip"
    command = [sys.executable, "setup.py", "--name"]
    whole = subprocess.run(command, cwd=source, capture_output=True, text=True, check=True)
    assert whole.stdout.split()[-1] == "vllm-adaskip"
    if lose == "link":  # as git leaves it where there are no links
        (source / "classifiers").unlink()
        (source / "classifiers").write_text("vllm_adaskip/classifiers")
    elif lose == "copy":
        (source / "model_executors").unlink()
        shutil.copytree(package / "model_executors", source / "model_executors")
    elif lose == "method":
        shutil.rmtree(package / "classifiers" / "first")
    elif lose == "family":
        (package / "model_executors" / "llama.py").unlink()
    else:
        shutil.rmtree(package / "classifiers")
        (source / "classifiers").unlink()
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and words in done.stderr
    assert "cannot be built from these sources" in done.stderr


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
