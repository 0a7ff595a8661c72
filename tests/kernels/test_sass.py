"""The counts of machine instructions: how they are read, what is held against them, and Triton 3.6's kernels.

Those of the installed version are held in test_offline_compile.py, which compiles them anyway.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("triton")

import aot
import sass

ROOT = Path(__file__).parents[2]
OLDEST = "3.6.0"
DISASSEMBLY = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                       /* 0x00000a00ff017b82 */
                                                                                /* 0x000fe20000000800 */
        /*0010*/              @!P0 MUFU.EX2 R3, R3 ;                            /* 0x0000000300038308 */
.L_x_3:
        /*0020*/             @!UPT UTMALDG.3D [UR8], [UR4], desc[UR16] ;
        /*0030*/                   MUFU.RCP R3, R3 ;
        /*0040*/              @P6  BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*1ff50*/                  STSM.16.MT88.4 [R8], R4 ;
        /*1ff60*/                  NOP;
"""


def test_opcodes_are_counted() -> None:
    counts = {opcode: number for opcode, number in sass.count(DISASSEMBLY).items() if number}
    assert counts == {"instructions": 7, "MUFU": 2, "UTMALDG": 1, "BAR": 1, "STSM": 1}


def test_tables_have_the_columns_that_matter() -> None:
    for version in sass.MEASURED:
        rows = sass.table(version)
        assert {"up_swiglu", "down_dgrad", "down_dgrad_128x128", "wgrad_accumulate", "place"} <= set(rows)
        assert rows.keys() == sass.table("3.6").keys()
        for row in ("up_swiglu", "down_dgrad"):
            assert rows[row]["HGMMA"] == 4
            assert rows[row]["UTMALDG"] > 0
            # Two MUFU for each of a thread's activations (64, 128), and the integer divisions of the tile's position.
            assert rows[row]["MUFU"] <= {"up_swiglu": 2 * 64, "down_dgrad": 2 * 128}[row] + 16


@pytest.mark.parametrize(
    ("column", "factor"), [("instructions", 1.06), ("MUFU", 1.06), ("STS", 1.1), ("HGMMA", 2), ("UTMALDG", 0), ("UTMALDG", 2)]
)
@pytest.mark.parametrize("version", sass.MEASURED)
def test_what_creeps_back_is_named(version: str, column: str, factor: float) -> None:
    found = sass.table(version)
    assert sass.problems(found, version) == []
    found["up_swiglu"][column] = int(found["up_swiglu"][column] * factor)
    (problem,) = sass.problems(found, version)
    assert problem.startswith("up_swiglu: ")
    assert column in problem


def test_missing_and_new_rows_are_named() -> None:
    found = sass.table("3.6")
    found["new_kernel"] = found.pop("place")
    assert sorted(sass.problems(found, "3.6")) == [
        "new_kernel: not in the table of Triton 3.6",
        "place: in the table of Triton 3.6, not compiled",
    ]


def test_an_unknown_version_may_be_somewhat_worse() -> None:
    found = sass.table("3.6")
    assert sass.problems(found, "3.99") == []
    found["down_dgrad"]["instructions"] *= 2
    assert len(sass.problems(found, "3.99")) == 1


def _install_oldest() -> Path:
    """The folder of Triton's oldest supported version; a test without CI is skipped where it cannot be had."""
    site = aot.cache_folder().with_name(f"triton-{OLDEST}-site")
    if (site / "triton").is_dir():
        return site
    site.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=site.parent) as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            f"{folder}/new",
            f"triton=={OLDEST}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode:
            if os.environ.get("CI"):
                pytest.fail(done.stderr)
            pytest.skip(f"no Triton {OLDEST}: {done.stderr.strip().splitlines()[-1]}")
        shutil.move(f"{folder}/new", site)
    return site


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_oldest_triton_compiles_no_more_instructions() -> None:
    """The GPU machine that was announced has Triton 3.6, this one usually a newer."""
    installed = sass.version()
    site = [] if installed == "3.6" else [str(_install_oldest())]
    code = "import json, sass; print(json.dumps([sass.version(), dict(sass.measure())]))"
    path = os.pathsep.join([*site, str(ROOT), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=1400)
    assert done.returncode == 0, done.stderr[-3000:]
    version, found = json.loads(done.stdout.splitlines()[-1])
    assert version == "3.6"
    wrong = sass.problems(found, version)
    assert not wrong, "\n".join(wrong)
