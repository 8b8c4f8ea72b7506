# SPDX-License-Identifier: Apache-2.0
"""Method ``first``: a router before each layer decides from the prompt."""
