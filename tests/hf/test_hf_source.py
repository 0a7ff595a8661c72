"""Folders to import that are damaged, foreign or unsafe."""

from pathlib import Path

import pytest
import torch
from hf_models import ROUTER, random_model
from safetensors.torch import load_file, save_file

from megagrin.hf.folder import ExportOptions, export_model, import_model

_FP32 = ExportOptions()


class TestDamagedSource:
    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        export_model(random_model(), ROUTER, None, tmp_path / "source", _FP32)
        return tmp_path / "source"

    @staticmethod
    def _weights(source: Path) -> Path:
        return source / "model-00001-of-00001.safetensors"

    def _rewrite(self, source: Path, changes: dict[str, torch.Tensor | None]) -> None:
        """Replace, add or (None) drop tensors, in one unsharded file."""
        tensors = load_file(self._weights(source)) | changes
        save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, source / "model.safetensors")
        (source / "model.safetensors.index.json").unlink()

    def test_tensors(self, source: Path) -> None:
        gate = "model.layers.1.block_sparse_moe.gate.weight"
        self._rewrite(
            source,
            {"model.norm.bias": None, "extra": torch.zeros(1), gate: torch.zeros(6, 60), "lm_head.bias": torch.zeros(131).int()},
        )
        with pytest.raises(ValueError, match="4 settings") as error:
            import_model(source)
        for line in ("model.norm.bias: missing", "extra: unexpected", f"{gate}: shape [6, 60] must be [5, 60]", "dtype I32"):
            assert line in str(error.value)

    def test_half_and_rotary_buffers_are_read(self, source: Path) -> None:
        halved = load_file(self._weights(source))["lm_head.bias"].half()
        self._rewrite(source, {"lm_head.bias": halved, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)})
        assert torch.equal(import_model(source)[0].lm_head.bias, halved.float())

    def test_truncated(self, source: Path) -> None:
        weights = self._weights(source)
        weights.write_bytes(weights.read_bytes()[:-1])
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            import_model(source)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "not valid JSON"),
            ("[]", "must hold an object"),
            ('{"weight_map": 1}', "weight_map must map"),
            ('{"weight_map": {"a": "../model.safetensors"}}', "not the name of a file beside it"),
            ('{"weight_map": {"a": ""}}', "not the name of a file beside it"),
            ('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}', "lacks a"),
        ],
    )
    def test_index(self, source: Path, content: str, message: str) -> None:
        (source / "model.safetensors.index.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            import_model(source)

    def test_missing_shard(self, source: Path) -> None:
        self._weights(source).unlink()
        with pytest.raises(FileNotFoundError, match="model-00001"):
            import_model(source)

    def test_pickles(self, source: Path) -> None:
        (source / "model.safetensors.index.json").unlink()
        self._weights(source).rename(source / "pytorch_model.bin")
        with pytest.raises(ValueError, match="pickles"):
            import_model(source)

    def test_no_weights_no_folder(self, source: Path) -> None:
        (source / "model.safetensors.index.json").unlink()
        with pytest.raises(ValueError, match="neither"):
            import_model(source)
        with pytest.raises(ValueError, match=r"it has no config\.json"):
            import_model(source / "nowhere")
