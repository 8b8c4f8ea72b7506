# SPDX-License-Identifier: Apache-2.0
"""Requests of the scheduler's own, which read an answer as a prompt; no client hears of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

from vllm import SamplingParams
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput

__all__ = ["Request", "RereadingScheduler", "is_plainly_greedy"]


class RereadingScheduler(Scheduler):
    """Reads answers again, and hands what was read to a subclass instead of to clients.

    Since 0.26 (`Request`; ``EngineCoreOutput.new_prompt_logprobs_tensors``, a row for each token
    of the prompt that ran, of the token behind it). Remove when a plugin may send requests to its
    own engine.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._numbers = count()
        self._reads: dict[str, Request] = {}

    @abstractmethod
    def was_read(self, gaps: Sequence[float]) -> None:
        """Take how much likelier than each token of an answer the first choice is, in nats."""

    @property
    def is_reading(self) -> bool:
        """Whether an answer is being read."""
        return bool(self._reads)

    def answer_begins(self, request: Request) -> int | None:
        """Return where the answer begins that a request reads; None: it is a client's."""
        read = self._reads.get(request.request_id)
        return None if read is None else read.num_prompt_tokens

    def read_again(self, request: Request, arguments: Mapping[str, Any]) -> None:
        """Read the prompt and the answer of a finished request, under other arguments."""
        name = f"adaskip-reads-{next(self._numbers)}"
        self._reads[name] = request
        params = SamplingParams(
            temperature=0,
            max_tokens=1,
            prompt_logprobs=1,
            skip_reading_prefix_cache=False,  # its prompt may be found, see `answer_begins`
            detokenize=False,
            extra_args=dict(arguments),
        )
        longest = self.max_model_len - 1  # vLLM generates a token after it
        self.add_request(
            Request(
                name,
                [*request.all_token_ids][:longest],
                params,
                None,
                lora_request=request.lora_request,
                cache_salt=request.cache_salt,
                block_hasher=getattr(request._block_hasher, "plain", request._block_hasher),
            )
        )

    def finish_requests(self, *args: Any, **kwargs: Any) -> Any:
        """Finish as vLLM does; what is read may be among them."""
        found = super().finish_requests(*args, **kwargs)
        self._reads = {name: read for name, read in self._reads.items() if name in self.requests}
        return found

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        """Update as vLLM does, and keep what was read from the clients."""
        outputs = super().update_from_output(*args, **kwargs)
        if self._reads:
            for each in outputs.values():
                own = [one for one in each.outputs if one.request_id in self._reads]
                each.outputs = [one for one in each.outputs if one.request_id not in self._reads]
                for one in own:
                    self._hear(one)
        return outputs

    def _hear(self, output: EngineCoreOutput) -> None:
        read = self._reads.pop(output.request_id)
        if (found := output.new_prompt_logprobs_tensors) is not None:  # else it failed
            tokens = min(read.num_tokens, self.max_model_len - 1) - read.num_prompt_tokens
            rows = found.logprobs[len(found.logprobs) - tokens :, :2].tolist()
            self.was_read([max(row) - row[0] for row in rows])


def is_plainly_greedy(params: SamplingParams) -> bool:
    """Return whether each token of a request is the likeliest, and nothing else has a say."""
    return (
        params.temperature == 0
        and params.structured_outputs is None
        and not (params.logit_bias or params.bad_words or params.allowed_token_ids)
        and not (params.presence_penalty or params.frequency_penalty or params.min_tokens)
        and params.repetition_penalty == 1
    )
