"""A checkpoint that cannot be written: one line on every rank, and everything that was there before is as it was."""

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import GlooPool

from megagrin.checkpoint import store
from megagrin.checkpoint.store import CheckpointInfo
from megagrin.models.transformer import ModelConfig, Transformer

INFO = CheckpointInfo(1, 4, {"model": {}, "router": {}})
ELEMENTS = 1 << 18


@contextlib.contextmanager
def small_files(limit: int) -> Iterator[None]:
    """No file of this process may grow beyond a number of bytes: a write then fails as on a full disk, with another errno."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _save(run_dir: str, failing: list[int], format_: str) -> Any:
    """Save step 1 with room, and step 2 without on the failing ranks; returns (type, message, notes)."""
    tensors = {f"t{rank}": torch.full((ELEMENTS,), 1.0 + rank) for rank in range(dist.get_world_size())}

    def write(folder: Path) -> None:
        if format_ == "native":
            store.write_tensors(folder, tensors)
        else:  # as DeepSpeed does: each rank a file of its own
            torch.save(tensors, folder / f"rank{dist.get_rank()}.pt")

    store.commit(Path(run_dir), INFO, write)
    with small_files(1 << 16) if dist.get_rank() in failing else contextlib.nullcontext():
        try:
            store.commit(Path(run_dir), CheckpointInfo(2, 8, INFO.run), write)
        except OSError as error:
            return str(error), error.__notes__
    return None


@pytest.mark.parametrize("kind", ["native", "files"])
@pytest.mark.parametrize("failing", [[0], [1], [0, 1]], ids=str)
def test_every_rank_hears_the_reason(gloo: GlooPool, tmp_path: Path, failing: list[int], kind: str) -> None:
    """Whichever rank has no room: all raise the same OSError, nothing of the save stays, the checkpoint before is whole."""
    answers = gloo.run(2, _save, str(tmp_path), failing, kind)
    assert answers[0] is not None
    assert answers[0] == answers[1]
    message, notes = answers[0]
    assert message.startswith(f"{tmp_path}/checkpoints/step_00000002: the checkpoint of step 2 cannot be written: ")
    assert "\n" not in message
    assert "Traceback" not in message
    assert notes == ["every rank"]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    if kind == "native":
        tensors = {"t1": torch.zeros(ELEMENTS)}
        gloo.run(1, _load, str(tmp_path / "checkpoints" / "step_00000001"), tensors)


def _load(path: str, tensors: dict[str, torch.Tensor]) -> None:
    store.load(Path(path), tensors)
    assert torch.equal(tensors["t1"], torch.full((ELEMENTS,), 2.0))


def _load_missing(path: str) -> tuple[str, list[str]]:
    with pytest.raises(ValueError, match="cannot be loaded into this model") as caught:
        store.load(Path(path), {"absent": torch.zeros(3)})
    return str(caught.value), caught.value.__notes__


def test_a_missing_tensor_is_one_line(gloo: GlooPool, tmp_path: Path) -> None:
    """DCP's exception is no Exception: it would pass by every handler as a page of traceback."""
    gloo.run(2, _save, str(tmp_path), [], "native")
    path = tmp_path / "checkpoints" / "step_00000001"
    answers = gloo.run(2, _load_missing, str(path))
    assert answers[0] == answers[1]
    assert "absent" in answers[0][0]
    assert "\n" not in answers[0][0]


def test_imported_weights_leave_nothing_behind(tmp_path: Path) -> None:
    """A checkpoint of plain weights appears whole or not at all."""
    model = Transformer(ModelConfig(vocab_size=3000, n_layers=1))
    with small_files(1 << 16), pytest.raises(OSError, match="the checkpoint cannot be written"):
        store.save_model(tmp_path / "out", model, {"model": {}, "router": {}})
    assert list(tmp_path.iterdir()) == []
