# SPDX-License-Identifier: Apache-2.0
"""One file per model family: vLLM's own class, with a skip plan per sequence."""
