# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU worker, for engines that draft."""

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_adaskip.engine.compat.drafting import attach, mend_sampling
from vllm_adaskip.engine.counts import AdaSkipWorkerExtension


class DraftingWorker(CPUWorker, AdaSkipWorkerExtension):
    """Hands its runner to the drafter, and has drafts judged as requests ask for.

    Named in one engine's ``worker_cls`` option.
    """

    def init_device(self) -> None:
        """Make the runner, and with it the drafter."""
        super().init_device()
        attach(self.model_runner)
        mend_sampling()
