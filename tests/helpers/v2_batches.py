# SPDX-License-Identifier: Apache-2.0
"""What Model Runner V2 hands a model state, with no field that a release we support lacks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from vllm_adaskip import engine_args

#: Host-side fields of `InputBatch` and of `NewRequestData`, those of 0.26: later ones only add.
BATCH_FIELDS = {
    "req_ids",
    "num_reqs",
    "num_reqs_after_padding",
    "idx_mapping_np",
    "num_scheduled_tokens",
    "num_tokens",
    "num_tokens_after_padding",
    "num_draft_tokens",
    "query_start_loc_np",
    "seq_lens_cpu_upper_bound",
    "num_computed_tokens_np",
    "prefill_len_np",
    "num_computed_prefill_tokens_np",
    "is_prefilling_np",
}
REQUEST_FIELDS = {
    "req_id",
    "prompt_token_ids",
    "mm_features",
    "sampling_params",
    "pooling_params",
    "block_ids",
    "num_computed_tokens",
    "lora_request",
    "prompt_embeds",
    "prompt_is_token_ids",
    "prefill_token_ids",
}
ROWS = 5
Plan = list[int | str] | None


def v2_config(model: str) -> Any:
    """A config as it comes to the worker of an engine under V2, but for the runner's choice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VllmConfig, "use_v2_model_runner", True)
        patch.setattr("vllm.config.vllm.HAS_TRITON", True)
        return EngineArgs(
            model,
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_num_seqs=ROWS,
            **engine_args(method="static", skip=[1]),
        ).create_engine_config()


def request_data(name: str, prompt: int, generated: int = 0, plan: Plan = None) -> Any:
    """A `NewRequestData` with no field that a release lacks."""
    known = dict.fromkeys(REQUEST_FIELDS)
    args = None if plan is None else {"adaskip_skip": plan}
    return SimpleNamespace(
        **{
            **known,
            "req_id": name,
            "prompt_token_ids": [1] * prompt,
            "prefill_token_ids": [1] * (prompt + generated),
            "sampling_params": SamplingParams(extra_args=args),
        }
    )


def batch(computed: dict[str, int], scheduled: dict[str, int], padding: int = 0) -> Any:
    """An `InputBatch` with no field that a release lacks, in the order of ``scheduled``."""
    known = dict.fromkeys(BATCH_FIELDS)
    tokens = np.array([*scheduled.values()], dtype=np.int32)
    starts = np.concatenate(([0], np.cumsum(tokens), [tokens.sum()] * padding))
    done = np.array([computed[name] for name in scheduled], dtype=np.int32)
    return SimpleNamespace(
        **{
            **known,
            "req_ids": [*scheduled],
            "num_reqs": len(scheduled),
            "num_reqs_after_padding": len(scheduled) + padding,
            "num_scheduled_tokens": tokens,
            "query_start_loc_np": starts.astype(np.int32),
            "num_computed_tokens_np": done,
        }
    )
