# SPDX-License-Identifier: Apache-2.0
"""Method ``adainfer``: tokens stop on their way up once the answer will not change any more."""
