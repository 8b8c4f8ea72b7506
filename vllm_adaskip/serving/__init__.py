# SPDX-License-Identifier: Apache-2.0
"""What the HTTP server gains."""
