# SPDX-License-Identifier: Apache-2.0
"""The fit of AdaInfer: learns after which layer an answer does not change any more."""
