# SPDX-License-Identifier: Apache-2.0
"""Method ``adaskip``: what changes the stream of the prompt least is left out."""
