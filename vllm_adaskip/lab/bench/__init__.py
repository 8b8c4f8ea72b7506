# SPDX-License-Identifier: Apache-2.0
"""What skipping is worth on the clock: steps of several engines, timed side by side."""
