# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys

import pytest

from vllm_adaskip.classifiers import METHODS, DecoderShape, PlanError
from vllm_adaskip.classifiers.static import Static, StaticOptions

SHAPE = DecoderShape(4, attention_parameters=1, mlp_parameters=3)

#: Options with which every method can be made; a new method must be added here.
EXAMPLES: dict[str, dict[str, object]] = {"none": {}, "static": {"skip": [1, "attn:2"]}}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_decides_the_same_plan_again_within_its_budget(name: str) -> None:
    method = METHODS[name]
    classifier = method(SHAPE, method.Options.model_validate(EXAMPLES[name]))
    classifier.check(1.0)
    plan = classifier.decide(1.0, None)
    assert plan == classifier.decide(1.0, None)
    assert plan.num_layers == SHAPE.num_layers and not plan.skips_everything
    with pytest.raises(PlanError, match=r"budget of 0\.01 cannot be met"):
        classifier.check(0.01)


def test_static_meets_exactly_the_budget_its_plan_keeps() -> None:
    static = Static(SHAPE, StaticOptions(skip=[1, "attn:2"]))
    kept = 1 - 5 / 16
    static.check(kept)
    assert static.decide(kept, None).share(SHAPE) == kept
    with pytest.raises(PlanError, match=r"keeps 0\.688"):
        static.check(kept - 1e-9)


def test_classifiers_never_import_vllm() -> None:
    code = "import sys, vllm_adaskip.classifiers; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
