# SPDX-License-Identifier: Apache-2.0
from typing import Any

import pytest

from vllm_adaskip import DecoderShape
from vllm_adaskip.config import AdaSkipConfig, ConfigError

SHAPE = DecoderShape(8, attention_parameters=1, mlp_parameters=3)


def test_defaults_decide_nothing() -> None:
    config = AdaSkipConfig.parse({})
    assert (config.method, config.max_compute, config.method_options) == ("none", 1.0, {})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["static"], ["['static']", "JSON object"]),
        ({"method": "statik"}, ["method", "'statik'", "first, none, static"]),
        ({"method": 3}, ["method", "3"]),
        ({"mehtod": "static"}, ["mehtod", "did you mean 'method'"]),
        ({"max_compute": 0}, ["max_compute", "0", "greater than 0"]),
        ({"max_compute": 1.5}, ["max_compute", "1.5"]),
        ({"max_compute": "0.5"}, ["max_compute", "'0.5'"]),
        ({"coalesce_regret": 1.5}, ["coalesce_regret", "1.5", "less than or equal to 1"]),
        ({"coalesce_regret": -0.1}, ["coalesce_regret", "-0.1"]),
        ({"coalesce_regret": float("nan")}, ["coalesce_regret", "nan"]),
        ({"coalesce_regret": True}, ["coalesce_regret", "True"]),
        ({"guard": "yes"}, ["guard", "'yes'", "boolean"]),
        ({"guard": 1}, ["guard", "1"]),
        ({"kv_fill": "paste"}, ["kv_fill", "'paste'", "'copy', 'project' or 'none'"]),
        ({"method": "static"}, ["skip is missing", "static"]),
        ({"method": "static", "skip": "5"}, ["skip", "'5'", "list"]),
        ({"method": "static", "skip": [5.5]}, ["skip", "5.5"]),
        ({"method": "static", "skip": [5], "skp": 1}, ["skp", "did you mean 'skip'"]),
        ({"skip": [5]}, ["skip", "belongs to method 'static'", "'none'"]),
        ({"": 1}, ["unknown option"]),
        ({"prompt": 24}, ["adaskip.prompt: 24"]),
        (
            {"prompt": {"exit": 4, "skip": [1]}},
            ["adaskip.prompt", "'exit' or 'skip', and not both"],
        ),
        ({"prompt": {"tail": 4}}, ["adaskip.prompt", "needs 'exit' or 'skip'"]),
        ({"prompt": {"exit": 4, "tial": 4}}, ["adaskip.prompt.tial", "exit, skip, tail, from"]),
        ({"prompt": {"exit": "4"}}, ["adaskip.prompt.exit: '4'", "integer"]),
        ({"prompt": {"exit": 4, "tail": 0}}, ["adaskip.prompt.tail: 0"]),
        ({"prompt": {"exit": 4, "from": -1}}, ["adaskip.prompt.from: -1"]),
    ],
)
def test_refuses_with_the_key_the_value_and_what_is_allowed(options: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        AdaSkipConfig.parse(options)
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "static", "skip": [8]}, ["8", "layers 0 to 7"]),
        ({"prompt": {"exit": 9}}, ["prompt: 9", "1 to 8"]),
        ({"prompt": {"skip": [8]}}, ["prompt: 8", "layers 0 to 7"]),
        ({"method": "static", "skip": list(range(8))}, ["all 16 sub-layers"]),
        ({"method": "static", "skip": [1], "max_compute": 0.5}, ["0.5", "keeps 0.875"]),
        ({"max_compute": 0.5}, ["0.5", "'none' skips nothing"]),
        (
            {"coalesce_regret": 0.5},
            ["coalesce_regret", "0.5", "method 'none'", "'adaskip', 'first'"],
        ),
    ],
)
def test_refuses_what_does_not_fit_the_model(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        AdaSkipConfig.parse(options).facts(SHAPE)
    for word in words:
        assert word in str(refusal.value)
