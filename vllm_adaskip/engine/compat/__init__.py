# SPDX-License-Identifier: Apache-2.0
"""Every vLLM name that vLLM does not document, in one place.

Each carries *since* (first release it was seen in, of those we support, 0.26 to 0.33) and
*remove when*. Nothing here changes vLLM but `extend_parser` and `check_engines`, which wrap the
builders of the argument parser and of an engine's config, once each. The other modules are
imported where they are used.
"""

from vllm_adaskip.engine.compat.admission import name_feeder
from vllm_adaskip.engine.compat.forward import (
    SubBatches,
    of_rank_0,
    share,
    shared,
    step_lengths,
    warm_up,
)
from vllm_adaskip.engine.compat.startup import (
    check_engines,
    enable_amx,
    extend_parser,
    is_probe,
    register_config_hook,
)

__all__ = [
    "SubBatches",
    "check_engines",
    "enable_amx",
    "extend_parser",
    "is_probe",
    "name_feeder",
    "of_rank_0",
    "register_config_hook",
    "share",
    "shared",
    "step_lengths",
    "warm_up",
]
