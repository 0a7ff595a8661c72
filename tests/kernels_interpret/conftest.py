"""These tests run the Triton kernels in Triton's interpreter; the variable must be set before any kernel is imported.

Cases that the references are tested with serve here, too: their folders are put on the path.
"""

import os
import sys
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("tests/kernels_interpret: start pytest with TRITON_INTERPRET=1 (make test does)")

for folder in ("kernels", "moe"):
    sys.path.append(str(Path(__file__).parents[1] / folder))
