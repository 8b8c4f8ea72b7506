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

    from vllm_adaskip.engine.facts import EngineFacts


class ForFrontEnd(list[str | type]):
    """Logits processors that the front end asks, and that no runner loads.

    Before 0.32 Model Runner V2 has none, and is not chosen, or refused, where any are named;
    the front end asks those that are named whatever the runner. So this list calls itself
    empty, and is not. Since 0.26. Remove when 0.31 is no longer supported.
    """

    def __bool__(self) -> bool:
        return False


def name_feeder(vllm_config: VllmConfig, facts: EngineFacts) -> None:
    """Name the class that checks an engine's requests; under V1 it feeds the table too.

    Since 0.26. Remove when a plugin may check requests without being a logits processor.
    """
    from vllm_adaskip.engine import v1_feeder

    model = vllm_config.model_config
    theirs = list(model.logits_processors or [])
    if not vllm_config.use_v2_model_runner:
        model.logits_processors = [*theirs, v1_feeder.class_path(facts)]
    elif find_spec("vllm.v1.worker.gpu.sample.logits_processor"):
        from vllm_adaskip.engine.compat import request_check

        model.logits_processors = [*theirs, request_check.class_path(facts)]
    else:
        # With some of the user's, vLLM is to refuse the runner itself.
        kind = list if theirs else ForFrontEnd
        model.logits_processors = kind([*theirs, v1_feeder.class_path(facts)])
