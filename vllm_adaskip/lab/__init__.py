# SPDX-License-Identifier: Apache-2.0
"""The laboratory: measures, fits and trains; the plugin never imports it."""
