# SPDX-License-Identifier: Apache-2.0
"""What models are asked: prompts with their right answers, and how answers are scored."""
