# SPDX-License-Identifier: Apache-2.0
"""A model's own answers to prompts: what a draft must foresee."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vllm_adaskip.lab.data.items import DataError
from vllm_adaskip.lab.fitting.samples import Sample
from vllm_adaskip.lab.precision import is_fast_in_16_bits

#: The least tokens of an answer that is kept.
LEAST = 4


def answered(model: str, samples: Sequence[Sample], tokens: int, kept: Path) -> list[Sample]:
    """Return the prompts with the model's greedy answers, made now or found in a file.

    Args:
        model: folder or hub id.
        samples: whose answers are passed over.
        tokens: of an answer, at most.
        kept: file of answers, so that a stopped fit need not ask again.

    Raises:
        DataError: hardly any prompt got an answer.

    """
    prompts = [one.ids[: -one.answer] for one in samples]
    if kept.exists():
        flat = load_file(kept)
        found = [ids.tolist() for ids in flat["ids"].split(flat["lengths"].tolist())]
    else:
        found = _generated(model, prompts, tokens)
        lengths = torch.tensor([len(ids) for ids in found])
        ids = torch.tensor([token for ids in found for token in ids], dtype=torch.int64)
        part = kept.with_suffix(".part")
        save_file({"ids": ids, "lengths": lengths}, part)
        part.replace(kept)
    own = [
        Sample(one.task, [*prompt, *answer], len(answer))
        for one, prompt, answer in zip(samples, prompts, found, strict=True)
        if len(answer) >= LEAST
    ]
    if len(own) < 2:
        raise DataError(
            f"{model}: {len(own)} of {len(prompts)} prompts got an answer of {LEAST} tokens; use "
            "other prompts, or --answers given"
        )
    return own


def _generated(model: str, prompts: Sequence[list[int]], tokens: int) -> list[list[int]]:
    """Return greedy answers, from stock vLLM in this process."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    longest = max(map(len, prompts)) + tokens + 1
    slow = current_platform.is_cpu() and not is_fast_in_16_bits()
    dtype: Any = "float32" if slow else "auto"
    llm = LLM(model, max_model_len=longest, max_num_seqs=64, enforce_eager=True, dtype=dtype)
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(temperature=0, max_tokens=tokens, detokenize=False),
        use_tqdm=False,  # fits switch tqdm off, and vLLM then divides by the time it showed
    )
    llm.llm_engine.engine_core.shutdown()
    return [list(output.outputs[0].token_ids) for output in outputs]
