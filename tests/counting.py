"""Counts what torch is asked to do: operators with the bytes of their operands, casts, and waits for the device.

Custom operators of this project are opened, so that what their references do is counted, too.
"""

import contextlib
import dataclasses
import itertools
import sys
import traceback
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# They change what is known of a tensor and touch none of its numbers.
VIEWS = {"view", "_unsafe_view", "t", "transpose", "permute", "expand", "select", "slice", "split", "split_with_sizes", "unbind"}
VIEWS |= {"unsqueeze", "squeeze", "detach", "alias", "as_strided", "chunk", "empty", "empty_like", "new_empty", "reshape"}
VIEWS |= {"empty_strided", "resize_", "set_", "lift_fresh", "diagonal", "unfold", "_reshape_alias", "is_pinned", "view_as"}


@dataclasses.dataclass(frozen=True)
class Call:
    """One operator.

    Attributes:
        name: without overload, as `aten.add`.
        given: tensors among its arguments: shape and dtype.
        made: the same of its results.
        size: bytes of both.
    """

    name: str
    given: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    made: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    size: int

    def casts(self, source: torch.dtype, target: torch.dtype) -> list[int]:
        """Sizes, in elements, of the tensors that it casts from one dtype to another."""
        name = self.name.rpartition(".")[2]
        shapes = [(torch.Size(shape).numel(), dtype) for shape, dtype in self.given]
        if name in ("_to_copy", "to") and self.made:
            pairs = [(shapes[0], (shapes[0][0], self.made[0][1]))]
        elif name == "copy_":
            pairs = [(shapes[1], shapes[0])] if len(shapes) == 2 else []
        elif name == "_foreach_copy_":
            half = len(shapes) // 2
            pairs = list(zip(shapes[half:], shapes[:half], strict=True))
        else:
            pairs = []
        return [size for (size, given), (_, made) in pairs if (given, made) == (source, target)]


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


_inside_reference = 0


class Counting(TorchDispatchMode):
    """Notes every operator that is not a view in `calls`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().partition(".")[0]
        if name in OPDEFS and name.startswith("megagrin::"):
            global _inside_reference
            _inside_reference += 1
            try:
                with self:
                    return OPDEFS[name]._init_fn(*args, **kwargs)
            finally:
                _inside_reference -= 1
        out = func(*args, **kwargs)
        namespace, _, base = name.partition("::")
        if base not in VIEWS:
            given, made = _tensors((args, kwargs)), _tensors(out)
            described = [tuple((tuple(t.shape), t.dtype) for t in tensors) for tensors in (given, made)]
            size = sum(t.numel() * t.element_size() for t in (*given, *made))
            self.calls.append(Call(f"{namespace}.{base}", *described, size))
        return out


def _asked_by_a_mesh() -> bool:
    frames = traceback.walk_stack(sys._getframe(1))
    return any(frame.f_code.co_filename.endswith("device_mesh.py") for frame, _ in itertools.islice(frames, 8))


@contextlib.contextmanager
def waits() -> Iterator[list[str]]:
    """Collects, by name, what in the with block would make the host wait for a GPU: reads, and shapes that are data.

    Inside `Counting` the references of custom operators are left out: they read counts that the kernels do not. Meshes keep
    their ranks on the host.
    """
    found: list[str] = []

    def noted(name: str) -> Any:
        original = getattr(Tensor, name)

        def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not _inside_reference and not _asked_by_a_mesh():
                found.append(name)
            return original(self, *args, **kwargs)

        return mock.patch.object(Tensor, name, call)

    names = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(noted(name))
        stack.enter_context(_DataShapes(found))
        yield found


class _DataShapes(TorchDispatchMode):
    """Notes operators whose result the host must read before it goes on."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().partition(".")[0].rpartition("::")[2]
        masks = [index for index in args[1] if index is not None] if name in ("index", "index_put", "index_put_") else []
        read = name in _READ or any(index.dtype in (torch.bool, torch.uint8) for index in masks)
        if read and not _inside_reference and not _asked_by_a_mesh():
            self._found.append(name)
        return func(*args, **kwargs)


# repeat_interleave comes here without the size of its output only.
_READ = {"nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "unique_consecutive", "_unique2", "bincount"}
