# SPDX-License-Identifier: Apache-2.0
"""The bundled test model: its tasks, its training and its scoring."""
