# SPDX-License-Identifier: Apache-2.0
import pytest

from vllm_adaskip import bundled_model
from vllm_adaskip.cli.serve import serve_arguments


@pytest.mark.parametrize(
    ("model", "extra", "want"),
    [
        ("m", [], ["serve", "m", "--plugin", "adaskip", "--host", "127.0.0.1"]),
        ("m", ["--host", "::"], ["serve", "m", "--plugin", "adaskip", "--host", "::"]),
        ("m", ["--host=::"], ["serve", "m", "--plugin", "adaskip", "--host=::"]),
        (
            "m",
            ["--port", "1", "-tp", "2"],
            ["serve", "m", "--plugin", "adaskip", "--host", "127.0.0.1", "--port", "1", "-tp", "2"],
        ),
    ],
)
def test_it_is_vllm_serve_with_the_plugin_on_and_on_loopback(
    model: str, extra: list[str], want: list[str]
) -> None:
    assert serve_arguments(model, extra) == want


def test_without_a_model_it_serves_the_bundled_one() -> None:
    assert serve_arguments("", [])[1] == bundled_model()
    assert serve_arguments("--port", ["1"])[-2:] == ["--port", "1"]
