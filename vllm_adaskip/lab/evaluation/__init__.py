# SPDX-License-Identifier: Apache-2.0
"""What skipping costs in quality and saves in time: runs, their results, and reports of them."""
