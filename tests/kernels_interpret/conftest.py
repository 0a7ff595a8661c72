"""These tests run the Triton kernels in Triton's interpreter; the variable must be set before any kernel is imported."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("tests/kernels_interpret: start pytest with TRITON_INTERPRET=1 (make test does)")
