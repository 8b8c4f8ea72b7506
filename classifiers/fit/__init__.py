# SPDX-License-Identifier: Apache-2.0
"""The offline half of methods that learn: they fit a profile. Never imported by a server."""
