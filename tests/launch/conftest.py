"""A tiny run for the launch tests: random token files and a recipe that trains on them in seconds."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from megagrin.data_prep.indexed import IndexedDatasetWriter
from megagrin.data_prep.sidecar import Provenance

VOCAB = 64


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe with `train.run_dir` tmp_path/run: 6 steps of a two-layer model with four experts over two ranks."""
    rng = np.random.default_rng(0)
    with IndexedDatasetWriter(tmp_path / "train", Provenance(vocab_size=VOCAB)) as writer:
        for _ in range(50):
            writer.add(rng.integers(0, VOCAB, 200))
    model = {"n_layers": 2, "d_model": 32, "n_heads": 2, "n_kv_heads": 1, "head_dim": 16, "d_ff": 32, "n_experts": 4}
    sections = {
        "model": model | {"vocab_size": VOCAB, "max_positions": 32, "window": 32},
        "train": {"run_dir": str(tmp_path / "run"), "steps": 6, "seq_len": 32, "global_batch_size": 4, "micro_batch_size": 2},
        "optim": {"warmup_steps": 2},
        "data": {"train": str(tmp_path / "train")},
        "engine": {"dtype": "fp32"},
        "parallel": {"ep": 2},
        "metrics": {"peak_tflops": 1.0},
        "runtime": {"device": "cpu"},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


@pytest.fixture
def environment() -> dict[str, str]:
    """The caller's environment without what would steer the scripts, with this Python."""
    steering = {"NPROC", "NNODES", "HEAD", "PORT", "RDZV_ID", "LOG_DIR", "MAX_RESTARTS", "SHUTDOWN_TIMEOUT", "REQUEUE"}
    kept = {name: value for name, value in os.environ.items() if name not in steering}
    return kept | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
