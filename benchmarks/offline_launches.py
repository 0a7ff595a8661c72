"""Triton's launches on a machine without a GPU: everything that is done for them in Python, and nothing by a driver.

A driver that only answers "which target, device and stream" takes the place of the real one, and a compiled kernel is a stand-in
whose launcher is Triton's own class over a C function that does nothing. Binding of arguments, specialisation, the look-up of the
compiled kernel and the arguments of tensor descriptors are Triton's own code. Left out, because a CUDA driver would do it: the C
half of the launcher with cuLaunchKernelEx, and one cuTensorMapEncodeTiled for each tensor descriptor.
"""

import contextlib
import ctypes
import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from megagrin.kernels import backend, tuning

_ARCH = 90
_MULTIPROCESSORS = 132
_MODULES = tuple(sorted(path.stem for path in Path(backend.__file__).parent.glob("*_triton.py")))


class _Driver:
    """Answers what the launcher asks."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", _ARCH, 32)
        self.utils = SimpleNamespace(
            launch=_nothing, fill_tma_descriptor=_nothing, fill_tma_descriptor_tiled=_nothing, fill_tma_descriptor_im2col=_nothing
        )

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return _ARCH  # Triton caches per device: no mixing with kernels that were compiled

    def get_current_stream(self, device: int) -> int:
        return 0


def fill_places(kernel: str, arguments: Iterable[Any]) -> None:
    """Zeros for the indices that the sort would write: torch's own indexing may read them, and refuses what memory holds."""
    if kernel == "place_kernel":
        for value in arguments:
            if isinstance(value, torch.Tensor) and value.dtype == torch.int64:
                ctypes.memset(value.data_ptr(), 0, value.nbytes)


def _yes() -> bool:
    return True


def _nothing(*_args: Any) -> None:
    return None


class _Kernel:
    """A compiled kernel as far as `JITFunction.run` uses one; notes its name when it is launched."""

    function, packed_metadata = 0, ()

    def __init__(self, name: str, launcher: Any, launched: list[str]) -> None:
        def run(*args: Any) -> None:
            launched.append(name)
            fill_places(name, args)
            launcher(*args)

        self.run = run

    def launch_metadata(self, *_args: Any) -> None:
        return None


def _launcher(function: Any, signature: dict[str, Any], constants: dict[Any, Any]) -> Any:
    from triton.backends.nvidia import driver as nvidia

    described = [kind for kind in signature.values() if isinstance(kind, str) and kind.startswith("tensordesc")]
    descriptor = {"swizzle": 3, "elem_size": 2, "elem_type": 0, "block_size": [64, 64], "fp4_padded": False}
    elem_type = next(iter(nvidia.TMA_DTYPE_DEVICE_TO_HOST))
    metadata = SimpleNamespace(
        tensordesc_meta=[{**descriptor, "elem_type": elem_type} for _ in described],
        global_scratch_size=0,
        global_scratch_align=1,
        profile_scratch_size=0,
        profile_scratch_align=1,
        launch_cooperative_grid=False,
        launch_pdl=False,
        num_ctas=1,
    )
    source = SimpleNamespace(fn=function, signature=signature, constants=constants)
    # What is built with the driver's C code: in Triton 3.6 a launcher for each signature, in 3.9 the types of its arguments.
    replaced = {
        "compile_module_from_src": lambda **_: SimpleNamespace(launch=_nothing),
        "library_dirs": _nothing,
        "annotate_arguments": _nothing,
        "make_kernel_signature": _nothing,
    }
    with contextlib.ExitStack() as stack:
        for name, value in replaced.items():
            if hasattr(nvidia, name):
                stack.enter_context(mock.patch.object(nvidia, name, value))
        return nvidia.CudaLauncher(source, metadata)


@contextlib.contextmanager
def offline_launches() -> Iterator[list[str]]:
    """Inside, CPU tensors take the Triton path with sm_90's blocks and nothing is computed; gives the names launched so far.

    Outputs of kernels are uninitialised memory.

    Raises:
        RuntimeError: under TRITON_INTERPRET=1, where kernels are computed.
    """
    if backend.interpreted():
        raise RuntimeError("offline_launches: TRITON_INTERPRET=1 is set; launches are counted with the interpreter off")
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    for module in _MODULES:  # before the CPU is said to take kernels: they look whether they are interpreted
        importlib.import_module(f"megagrin.kernels.{module}")
    launched: list[str] = []

    def stand_in(self: Any, key: Any, signature: Any, device: Any, constexprs: Any, *_rest: Any) -> _Kernel:
        kernel = _Kernel(self.fn.__name__, _launcher(self, signature, constexprs), launched)
        self.device_caches[device][0][key] = kernel
        return kernel

    previous = driver._active
    driver.set_active(_Driver())
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, driver, "_active", previous)
        stack.enter_context(mock.patch.object(JITFunction, "_do_compile", stand_in))
        stack.enter_context(mock.patch.object(backend, "interpreted", _yes))
        stack.enter_context(mock.patch.object(backend, "_INTERPRETED_PROGRAMS", _MULTIPROCESSORS))
        for op in tuning.OPS:
            stack.enter_context(tuning.forced(op, tuning.fallback(op, torch.bfloat16, _ARCH // 10)))
        try:
            yield launched
        finally:
            for function in _kernels():
                function.device_caches.pop(_ARCH, None)


def _kernels() -> Iterator[Any]:
    from triton.runtime.jit import JITFunction

    for module in _MODULES:
        for value in vars(importlib.import_module(f"megagrin.kernels.{module}")).values():
            if isinstance(value, JITFunction):
                yield value


# Operators that start nothing on a GPU, and those whose parts do it. (Of the others' parts some exist on the CPU only.)
_IDLE = """
    alias as_strided detach detach_ empty empty_like empty_strided expand is_nonzero item lift_fresh new_empty permute
    promote_types result_type resolve_conj resolve_neg select set_ slice split squeeze t transpose unbind unflatten
    unsqueeze view view_as _local_scalar_dense _reshape_alias _unsafe_view
"""
_COMPOSITE = """
    to _to_copy contiguous reshape reshape_as flatten linear matmul zeros zeros_like new_zeros ones ones_like full
    full_like new_full clone stack
"""
_WAITS = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal"})


@dataclass(frozen=True)
class Calls:
    """What one call did.

    Attributes:
        kernels: Triton kernels by name, in order.
        operators: torch operators that start work on a GPU, by name, in order; composite ones by their parts.
        allocations: tensors whose memory was asked for.
        waits: operators and methods for which the host would wait for a GPU.
    """

    kernels: list[str]
    operators: list[str]
    allocations: int
    waits: list[str]


def _name(event: Any) -> str:
    return event.name.removeprefix("aten::") if event.name.startswith("aten::") else ""


def _working(event: Any) -> list[str]:
    """The operators that start work of an event: itself, or those below a composite one and below what is not torch's."""
    name = _name(event)
    if name in _IDLE.split():
        return []
    return (
        [part for child in event.cpu_children for part in _working(child)] if name in _COMPOSITE.split() or not name else [name]
    )


def calls_of(call: Callable[[], object], launched: list[str]) -> Calls:
    """Run a call and count what it did; `launched` as `offline_launches` gave it."""
    before, waits = len(launched), []

    def waiting(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def noted(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            waits.append(name)
            return method(self, *args, **kwargs)

        return noted

    with contextlib.ExitStack() as stack:
        # Methods that read a tensor of the CPU without an operator.
        for name in ("tolist", "cpu", "numpy"):
            stack.enter_context(mock.patch.object(torch.Tensor, name, waiting(name, getattr(torch.Tensor, name))))
        profile = stack.enter_context(torch.autograd.profiler.profile())
        call()
    events = profile.function_events
    names = [_name(event) for event in events]
    operators = [name for event in events if event.cpu_parent is None for name in _working(event)]
    return Calls(
        launched[before:],
        operators,
        sum(name in ("empty", "empty_strided") for name in names),
        waits + [name for name in names if name in _WAITS],
    )
