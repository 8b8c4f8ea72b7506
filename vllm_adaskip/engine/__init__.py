# SPDX-License-Identifier: Apache-2.0
"""What runs inside vLLM: sequence table, its feeder, step plan, sub-batches, counters."""
