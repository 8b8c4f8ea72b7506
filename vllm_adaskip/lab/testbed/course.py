# SPDX-License-Identifier: Apache-2.0
"""What is trained when: learning rate, lengths, and the shares of the tasks."""

from vllm_adaskip.lab.testbed import tasks

# How much of the training a task gets while it is not learned.
WEIGHTS = {
    "sentiment": 0.5,
    "topic": 0.4,
    "fact": 1.6,
    "hop": 1.8,
    "translate": 1.4,
    "key": 1.4,
    "sum": 1.2,
    "column": 2.0,
    "steps": 1.4,
}
# A learned task still gets this much of it, so that it is not forgotten.
KEPT = 0.15
WARM_UP, DECAY_FROM = 0.02, 0.5


def rate(progress: float) -> float:
    """Factor on the learning rate: short warm-up, flat half, straight down to zero."""
    return min(1.0, progress / WARM_UP + 0.01, max(1 - progress, 0.0) / (1 - DECAY_FROM))


def level(progress: float) -> float:
    """Lengths grow over the first quarter."""
    return min(1.0, progress / 0.25)


def shares(progress: float, learned: dict[str, float]) -> dict[str, float]:
    """Shares of tasks and exercises; `learned` is each task's exact match on the tune split."""
    result = {task: WEIGHTS[task] * (KEPT + 1 - learned.get(task, 0.0)) for task in tasks.TASKS}
    # Copying and word-for-word translation come first; other tasks build on them.
    fading = max(0.0, 1 - progress / 0.2)
    total = sum(result.values())
    result["copy"] = total * (0.5 * fading + 0.02)
    result["gloss"] = total * 0.25 * fading
    return result
