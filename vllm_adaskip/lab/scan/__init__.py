# SPDX-License-Identifier: Apache-2.0
"""Which sub-layers of a model can be left out, and whether it is worth it (``adaskip scan``)."""
