"""The forward kernel's machine code keeps what the draws rest on: no fused multiply-add, divisions rounded to nearest."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# The options come from LAUNCH, as those of a launch do.
PROGRAM = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megagrin.kernels import sparsemixer_triton as kernels

types = {"token_ptr": "*i64", "expert_ptr": "*i64", "count_part_ptr": "*i32", "limit": "fp32", "seed": "i64"}
constants = dict(E=16, K=2, INV_TEMPERATURE=0.5, BERNOULLI=1 << 30, GRADIENT=2.0, PAPER_MASK=False, DRAW=True, **kernels.tile(16))
kernel = kernels.sparsemixer_forward
default = lambda name: "*fp32" if name.endswith("_ptr") else "i32"
signature = {name: "constexpr" if name in constants else types.get(name, default(name)) for name in kernel.arg_names}
for options in (kernels.LAUNCH, dict(kernels.LAUNCH, enable_fp_fusion=True)):
    source = ASTSource(kernel, signature, constexprs=constants)
    assembly = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    print(len(re.findall(r"fma\\.rn\\.f32", assembly)), len(re.findall(r"div\\.rn\\.f32", assembly)))
"""


def test_no_contraction_and_rounded_divisions() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-2000:]
    (contracted, divisions), (if_allowed, _) = (map(int, line.split()) for line in run.stdout.splitlines())
    assert contracted == 0
    assert divisions > 0
    assert if_allowed > 0  # the option is what keeps it from happening
