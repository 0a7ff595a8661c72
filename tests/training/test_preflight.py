"""What a machine does not have is known before a rank starts, in whole sentences."""

from pathlib import Path

import pytest

from megagrin.training import preflight
from megagrin.training.run_config import parse_config


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("engine.attention=flex", "engine.attention: flex needs a CUDA device, this is cpu; take sdpa or auto"),
        (
            "optim.fused_adam=apex",
            "optim.fused_adam: apex runs on CUDA devices only, and this run is on cpu; use auto or torch",
        ),
        (
            "engine.layer_norm=apex",
            "engine.layer_norm: apex runs on CUDA devices only, and this run is on cpu; use auto or torch",
        ),
    ],
)
def test_kernels_of_another_device(tmp_path: Path, setting: str, sentence: str) -> None:
    run, _ = parse_config([f"--train.run_dir={tmp_path}/run", "--runtime.device=cpu", f"--{setting}"])
    assert preflight.violations(run) == [sentence]
    run, _ = parse_config([f"--train.run_dir={tmp_path}/run", "--runtime.device=cpu"])
    assert preflight.violations(run) == []
