# SPDX-License-Identifier: Apache-2.0
"""Method ``static``: one fixed plan for all sequences."""
