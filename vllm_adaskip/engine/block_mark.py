# SPDX-License-Identifier: Apache-2.0
"""Who may find a request's KV blocks in the prefix cache (clean cache, invariant 4).

Blocks that hold nothing but prompt tokens were computed at full depth and are everybody's.
What a block with generated tokens holds depends on the request's plan and on where its
prompt ended. So its hash is mixed with a *mark* of both: it can be found by a sequence with
the same tokens, plan and prompt length, which in practice is the same sequence coming back
after preemption, and by nobody else. A block that lacks KV in some layer is given a mark
that never comes again, so nobody finds it; nor a block of a plan that the batch had a say in.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from typing import Any

from vllm_adaskip.classifiers import Classifier, SkipPlan
from vllm_adaskip.engine.planner import Planner

#: Gives the mark of one more block.
Mark = Callable[[], bytes]


def unfindable() -> bytes:
    """Give a mark that never comes again."""
    return secrets.token_bytes(32)


def block_mark(
    planner: Planner, extra_args: Mapping[str, Any] | None, prompt_len: int
) -> Mark | None:
    """Give the mark of a request's blocks that reach past its prompt.

    None where these are like anybody's: every token is dense, and no method of this engine
    reads whole prompts. (A method that does needs its statistics of every token of a later
    prompt, and those of generated tokens are not kept.)
    """
    wanted = planner.wanted(extra_args)
    plan, kv_fill = wanted.plan, planner.facts.kv_fill
    if plan is None:
        # A coalesced plan also depends on the batch, so nothing we know here tells whose it is.
        holes = kv_fill == "none" or planner.facts.coalesce > 0
        identity = f"budget {wanted.budget!r}"
    elif plan.is_dense and not wanted.gated and not _reads_whole_prompts(planner.classifier):
        return None
    else:
        holes, identity = leaves_holes(plan, kv_fill), f"{plan.attention:x} {plan.mlp:x}"
    if holes:
        return unfindable
    # A gate decides by tokens, age and the engine's options, of which the last are all one here.
    gated = "gated " if wanted.gated else ""
    mark = f"{gated}{identity} after {prompt_len}".encode()
    return lambda: mark


def leaves_holes(plan: SkipPlan, kv_fill: str) -> bool:
    """Tell whether generated tokens under a plan lack K/V in some layer.

    `copy` has nothing to copy for a plan that runs no attention at all.
    """
    if kv_fill == "copy":
        return plan.attention == (1 << plan.num_layers) - 1
    return kv_fill == "none" and plan.attention != 0


def _reads_whole_prompts(classifier: Classifier) -> bool:
    return classifier.width > 0 and not classifier.last_only
