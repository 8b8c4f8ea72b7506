# SPDX-License-Identifier: Apache-2.0
"""What fits share: examples as tokens, and what a model of transformers makes of them."""
