# SPDX-License-Identifier: Apache-2.0
"""What several test files share; `tests/conftest.py` puts the folder above on Python's path."""
