# SPDX-License-Identifier: Apache-2.0
"""Method ``similarity``: what changes the stream of the prompt least is left out."""
