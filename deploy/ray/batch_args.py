# SPDX-License-Identifier: Apache-2.0
"""What an offline job is made from: deploy/ray/batch.yaml."""

from __future__ import annotations

from pydantic import Field

from deploy.ray.replica_args import ReplicaArgs


class BatchArgs(ReplicaArgs):
    """A replica's arguments, and those of the job.

    Attributes:
        replicas: engines side by side.
        part_rows: rows in a file of the output: what is lost at most of each part under way
            if the job is stopped.
        batch_rows: rows that are handed to an engine at a time.
        max_tokens: generated tokens at most, of a row that does not say.
        temperature: of a row that does not say; 0 is greedy.

    """

    replicas: int = Field(default=1, ge=1)
    part_rows: int = Field(default=256, ge=1)
    batch_rows: int = Field(default=32, ge=1)
    max_tokens: int = Field(default=64, ge=1)
    temperature: float = Field(default=0.0, ge=0)
