"""Every kernel compiles for sm_80, sm_90 and sm_100 within the limits of the architecture. No GPU is needed."""

import concurrent.futures
import dataclasses
import multiprocessing
import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import aot
import cases
import sass
from cases import ARCHS, Case

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter's kernels are not compiled")


def compile_case(case: Case) -> list[aot.Report] | str:
    """Reports of the kernels that a case launches, or the compiler's error."""
    try:
        with aot.compiling(case.arch) as compiled:
            case.run()
        return [aot.report(kernel, case.arch, disassemble=sass.is_counted(case)) for kernel in compiled]
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _start_worker(path: list[str]) -> None:
    sys.path[:] = path
    os.environ["TRITON_CACHE_DIR"] = str(aot.cache_folder())
    import torch

    torch.set_num_threads(1)
    # A pass that fails prints the whole module.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


@pytest.fixture(scope="module")
def reports() -> dict[Case, list[aot.Report] | str]:
    """All compilations, over all cores."""
    listed = cases.all_cases()
    context = multiprocessing.get_context("spawn")
    arguments = {"initializer": _start_worker, "initargs": (list(sys.path),), "mp_context": context}
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), **arguments) as pool:
        return dict(zip(listed, pool.map(compile_case, listed), strict=True))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", ARCHS)
def test_resources_and_instructions(reports: dict[Case, list[aot.Report] | str], arch: int) -> None:
    wrong = []
    for case, found in reports.items():
        if case.arch != arch:
            continue
        if isinstance(found, str):
            wrong.append(f"{case}: {found}")
            continue
        assert found, f"{case} launched nothing"
        wrong += [f"{case}: {report.kernel}: {'; '.join(report.problems())}" for report in found if report.problems()]
    assert not wrong, "\n".join(wrong)


@pytest.mark.timeout(900)
def test_every_kernel_is_compiled_for_every_architecture(reports: dict[Case, list[aot.Report] | str]) -> None:
    """A new kernel without a case fails here."""
    for arch in ARCHS:
        done = {
            report.kernel
            for case, found in reports.items()
            if case.arch == arch
            for report in found
            if found and not isinstance(found, str)
        }
        assert cases.entry_kernels() - done == set(), f"sm_{arch}: kernels without a compile case; see tests/kernels/cases.py"


@pytest.mark.timeout(900)
def test_hopper_products_load_by_tma(reports: dict[Case, list[aot.Report] | str]) -> None:
    """A product whose loads fall back to pointers is a third slower (docs/kernels.md) and passes every other test."""
    without = [
        f"{case}: {report.kernel}"
        for case, found in reports.items()
        if case.arch >= 90 and not isinstance(found, str)
        for report in found
        if report.dots and not report.bulk_loads
    ]
    assert not without, "\n".join(without)


@pytest.mark.timeout(900)
def test_hopper_kernels_have_no_more_instructions_than_were_measured(reports: dict[Case, list[aot.Report] | str]) -> None:
    """A second epilogue, an activation computed twice, a division path, a loop without TMA: all pass every other test."""
    found = {
        sass.row_name(case, report): report.counts
        for case, listed in reports.items()
        if sass.is_counted(case) and not isinstance(listed, str)
        for report in listed
    }
    wrong = sass.problems(found, sass.version())
    assert not wrong, "\n".join([*wrong, "where it is meant: rows for MEASURED come from `python tests/kernels/sass.py`"])


def test_entry_kernels_are_told_from_device_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "@triton.jit\ndef inner(x):\n    return inner(x)\n\n\n@triton.jit(do_not_specialize=['n'])\ndef outer(n):\n    inner(n)\n"
    )
    (tmp_path / "new_triton.py").write_text(source + "\n\ndef host():\n    outer[(1,)](2)\n")
    monkeypatch.setattr(cases, "KERNELS", tmp_path)
    cases._jit_functions.cache_clear()
    try:
        assert cases.entry_kernels() == {"outer"}
    finally:
        cases._jit_functions.cache_clear()


def test_limits_are_noticed() -> None:
    good = aot.Report("k", 90, 8, 4, 166, 0, 229_408, 0, 1, 0, 4, 8)
    assert good.problems() == []
    broken = [("registers", 257), ("spills", 1), ("shared", 232_449), ("tensor_memory", 513), ("tensor_core", 0)]
    for name, value in broken:
        assert len(dataclasses.replace(good, **{name: value}).problems()) == 1, name
    assert dataclasses.replace(good, exact=1, tensor_core=0).problems() == []
    copies = dataclasses.replace(good, dots=0, tensor_core=0, bulk_loads=0, registers=85)
    assert copies.problems() == []
    assert len(dataclasses.replace(copies, registers=86).problems()) == 1


@pytest.mark.timeout(300)
def test_spills_and_missing_tensor_cores_are_seen_in_real_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile that is known to spill must be reported as spilling: 128×256 on four warps."""
    launch = next((case for case in cases.all_cases() if case.launch == "m_grouped"), None)
    if launch is None:
        pytest.skip("no grouped product here")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(aot.cache_folder()))
    blocks = cases.BlockConfig(128, 256, 64, 4, 3, slices=1)
    found = compile_case(Case(launch.module, "m_grouped", 90, "bf16", "m_grouped", blocks))
    assert not isinstance(found, str), found
    assert any("spill" in problem for report in found for problem in report.problems()), found
