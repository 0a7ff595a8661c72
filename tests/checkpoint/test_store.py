"""Edges of writing and reading that whole runs do not reach."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import GlooPool

from megagrin.checkpoint import store
from megagrin.checkpoint.store import CheckpointInfo
from megagrin.models.init import init_parameters
from megagrin.models.transformer import ModelConfig, Transformer
from megagrin.moe.router import RouterConfig

MODEL = ModelConfig(n_layers=1, d_model=8, n_heads=2, n_kv_heads=1, head_dim=4, d_ff=4, n_experts=2, vocab_size=16)
RUN = {"model": {**MODEL.__dict__}, "router": {}}


def _model() -> Transformer:
    model = Transformer(MODEL, RouterConfig())
    init_parameters(model, MODEL, seed=1)
    return model


def _only_the_first_rank_reads(folder: str) -> bool:
    """Reading a whole model is no collective: the other rank does something else meanwhile."""
    if dist.get_rank() == 0:
        model, run = store.load_model(Path(folder))
        return run["model"]["d_ff"] == 4 and all(
            torch.equal(a, b) for a, b in zip(model.parameters(), _model().parameters(), strict=True)
        )
    return True


def test_one_rank_reads_a_model_alone(gloo: GlooPool, tmp_path: Path) -> None:
    store.save_model(tmp_path / "step_00000000", _model(), RUN)
    assert gloo.run(2, _only_the_first_rank_reads, str(tmp_path / "step_00000000")) == [True, True]


def test_what_an_interrupted_import_left_is_not_kept(tmp_path: Path) -> None:
    left = tmp_path / ".model.partial"
    left.mkdir()
    (left / "stale.safetensors").write_bytes(b"half a file")
    store.save_model(tmp_path / "model", _model(), RUN)
    assert not left.exists()
    assert "stale.safetensors" not in {path.name for path in (tmp_path / "model").iterdir()}


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match=r"/file/model: the checkpoint cannot be written: .*Not a directory"):
        store.save_model(tmp_path / "file" / "model", _model(), RUN)


def _fails_without_words(run_dir: str) -> str:
    def write(folder: Path) -> None:
        raise RuntimeError

    try:
        store.commit(Path(run_dir), CheckpointInfo(1, 4, RUN), write)
    except OSError as error:
        return str(error)
    return ""


def test_a_reason_without_text_is_named_by_its_type(gloo: GlooPool, tmp_path: Path) -> None:
    (message,) = gloo.run(1, _fails_without_words, str(tmp_path))
    assert message.endswith("the checkpoint of step 1 cannot be written: RuntimeError")
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(("keep", "left"), [(0, [1, 2, 3]), (1, [3]), (2, [2, 3]), (5, [1, 2, 3])])
def test_prune_keeps_the_newest(gloo: GlooPool, tmp_path: Path, keep: int, left: list[int]) -> None:
    """0 keeps all; a folder that a killed save left goes in any case."""
    for step in (1, 2, 3):
        gloo.run(1, _commit_nothing, str(tmp_path), step)
    leftover = tmp_path / "checkpoints" / ".step_00000004.partial"
    leftover.mkdir()
    store.prune(tmp_path, keep)
    assert [path.name for path in store.checkpoints(tmp_path)] == [f"step_{step:08d}" for step in left]
    assert not leftover.exists()


def _commit_nothing(run_dir: str, step: int) -> None:
    store.commit(Path(run_dir), CheckpointInfo(step, 4 * step, RUN), lambda folder: None)
