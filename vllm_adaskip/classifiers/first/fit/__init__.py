# SPDX-License-Identifier: Apache-2.0
"""The fit of FiRST: trains routers and LoRA, then makes a codebook and a calibration."""
