"""The benchmarks' modules are scripts beside each other, not a package: their folder joins the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
