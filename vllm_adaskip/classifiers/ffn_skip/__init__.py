# SPDX-License-Identifier: Apache-2.0
"""Method ``ffn-skip``: MLPs that hardly change the stream are left out."""
