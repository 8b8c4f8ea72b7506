# SPDX-License-Identifier: Apache-2.0
"""Where the front end refuses a request whose arguments are not allowed, under either runner.

vLLM asks the classes in ``logits_processors`` about every request before it is queued, and a
ValueError becomes HTTP 400. What such a class must be depends on the runner.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class ForFrontEnd(list[str | type]):
    """Logits processors that the front end asks, and that no runner loads.

    Before 0.32 Model Runner V2 has none, and is not chosen, or refused, where any are named;
    the front end asks those that are named whatever the runner. So this list calls itself
    empty, and is not. Since 0.26. Remove when 0.31 is no longer supported.
    """

    def __bool__(self) -> bool:
        return False


def name_feeder(vllm_config: VllmConfig, *, feeder: str, check: str) -> None:
    """Name the class that checks an engine's requests; under V1 it feeds the table too.

    Args:
        vllm_config: the engine's.
        feeder: ``module:Class`` of the V1 runner's logits processor.
        check: the same of Model Runner V2's, whose interface there is since 0.32.

    Since 0.26. Remove when a plugin may check requests without being a logits processor.

    """
    model = vllm_config.model_config
    theirs = list(model.logits_processors or [])
    if not vllm_config.use_v2_model_runner:
        model.logits_processors = [*theirs, feeder]
    elif find_spec("vllm.v1.worker.gpu.sample.logits_processor"):
        model.logits_processors = [*theirs, check]
    else:
        # With some of the user's, vLLM is to refuse the runner itself.
        kind = list if theirs else ForFrontEnd
        model.logits_processors = kind([*theirs, feeder])
