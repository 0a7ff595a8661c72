"""Exports that transformers loads and computes alike, imports of both layouts, and everything that is refused."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hf_models import BASE, ROUTER, perturb, random_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PhimoeConfig, PhimoeForCausalLM

from megagrin.checkpoint import store
from megagrin.checkpoint.store import TokenSource
from megagrin.cli import run_command
from megagrin.data_prep.tokenizer import Tokenizer
from megagrin.hf import folder
from megagrin.hf.folder import ExportOptions, export_model, import_model, plan_shards
from megagrin.inference.vocabulary import framed
from megagrin.models.transformer import ModelConfig, Transformer
from megagrin.training.run_config import parse_config

_SHAPES = {
    "window_below_sequence": BASE,
    "no_biases_kv_groups_1": replace(
        BASE,
        d_model=64,
        n_heads=4,
        n_kv_heads=4,
        head_dim=16,
        attention_bias=False,
        lm_head_bias=False,
        window=1000,
        n_experts=8,
    ),
    "own_head_dim_one_kv_head": replace(
        BASE, d_model=44, n_heads=5, n_kv_heads=1, head_dim=6, n_experts=2, window=1, norm_eps=1e-3
    ),
    "rope_theta": replace(
        BASE,
        d_model=64,
        n_heads=8,
        n_kv_heads=2,
        head_dim=8,
        n_experts=16,
        window=40,
        lm_head_bias=False,
        rope_theta=500.0,
        d_ff=48,
    ),
    "attention_bias_only_head": replace(BASE, attention_bias=False, vocab_size=67, n_layers=1, window=63),
}
_FP32 = ExportOptions()


def _tokens(vocab_size: int) -> torch.Tensor:
    return torch.randint(vocab_size, (2, 64), generator=torch.Generator().manual_seed(1))


def _load(folder: Path) -> PhimoeForCausalLM:
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager", output_loading_info=True
    )
    assert type(model) is PhimoeForCausalLM
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


@torch.inference_mode()
def _difference(ours: Transformer, theirs: PhimoeForCausalLM) -> float:
    """Largest difference of logits over both of transformers' attention implementations."""
    tokens_BS = _tokens(ours.config.vocab_size)
    logits_BSV = ours(tokens_BS).logits_BSV
    differences = []
    for implementation in ("eager", "sdpa"):
        theirs.set_attn_implementation(implementation)
        differences.append((logits_BSV - theirs(tokens_BS, use_cache=False).logits).abs().max().item())
    return max(differences)


def _hf_model(shape: ModelConfig) -> PhimoeForCausalLM:
    """A random transformers model of our shape, its configuration written by hand."""
    fields: dict[str, Any] = {"head_dim": shape.head_dim} if shape.head_dim * shape.n_heads != shape.d_model else {}
    config = PhimoeConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        max_position_embeddings=shape.max_positions,
        sliding_window=None if shape.window >= shape.max_positions else shape.window,
        rms_norm_eps=shape.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        num_local_experts=shape.n_experts,
        attention_bias=shape.attention_bias,
        lm_head_bias=shape.lm_head_bias,
        router_jitter_noise=ROUTER.mask_eps,
        initializer_range=shape.init_std,
        input_jitter_noise=0.01,
        **fields,
    )
    torch.manual_seed(5)
    config._experts_implementation = "eager"
    model = PhimoeForCausalLM(config)
    perturb(model)
    return model.eval()


@pytest.mark.parametrize("shape", _SHAPES.values(), ids=_SHAPES.keys())
class TestLogits:
    def test_export(self, shape: ModelConfig, tmp_path: Path) -> None:
        ours = random_model(shape)
        export_model(ours, ROUTER, None, tmp_path / "out", _FP32)
        assert _difference(ours, _load(tmp_path / "out")) < 1e-5

    @pytest.mark.parametrize("released", [True, False], ids=["released", "fused"])
    def test_import(self, shape: ModelConfig, released: bool, tmp_path: Path) -> None:
        theirs = _hf_model(shape)
        theirs.save_pretrained(tmp_path, save_original_format=released, max_shard_size="100KB" if released else "50GB")
        assert (tmp_path / "model.safetensors").is_file() is not released
        names = folder._weight_map(tmp_path) or load_file(tmp_path / "model.safetensors")
        assert any("block_sparse_moe" in name for name in names) is released
        ours, router = import_model(tmp_path)
        assert router == ROUTER
        assert replace(ours.config, preset=shape.preset, window=min(shape.window, 64)) == replace(
            shape, window=min(shape.window, 64)
        )
        assert _difference(ours, theirs) < 1e-5


@pytest.mark.parametrize(
    "change",
    [{"router_jitter_noise": 0.19}, {"sliding_window": 8}, {"rms_norm_eps": 0.01}, {"rope_parameters": {"rope_theta": 9e3}}],
)
def test_logits_depend_on_the_configuration(change: dict[str, Any], tmp_path: Path) -> None:
    """Without this the parity tests could pass on fields that do nothing."""
    ours = random_model()
    export_model(ours, ROUTER, None, tmp_path / "out", _FP32)
    path = tmp_path / "out/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert _difference(ours, _load(tmp_path / "out")) > 1e-3


def test_transformers_default_experts(tmp_path: Path) -> None:
    """Its grouped product needs widths that are multiples of 16 bytes; then the export works without any option."""
    shape = replace(BASE, d_model=64, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=32)
    ours = random_model(shape)
    export_model(ours, ROUTER, None, tmp_path / "out", _FP32)
    assert _difference(ours, AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()) < 1e-5


@pytest.mark.parametrize("max_shard_gb", [5.0, 1e-4, 1e-12])
def test_round_trip_is_bit_equal(max_shard_gb: float, tmp_path: Path) -> None:
    ours = random_model()
    export_model(ours, ROUTER, None, tmp_path / "out", ExportOptions(max_shard_gb=max_shard_gb))
    again, router = import_model(tmp_path / "out")
    assert (replace(again.config, preset=ours.config.preset), router) == (ours.config, ROUTER)
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name


def test_bfloat16_rounds_once(tmp_path: Path) -> None:
    ours = random_model()
    difference = export_model(ours, ROUTER, None, tmp_path / "out", ExportOptions("bfloat16", check=True))
    assert difference is not None
    assert difference < 1e-5
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    again, _ = import_model(tmp_path / "out")
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter.bfloat16().float(), again.get_parameter(name)), name


def test_shards(tmp_path: Path) -> None:
    limit = 40_000
    ours = random_model()
    export_model(ours, ROUTER, None, tmp_path / "out", ExportOptions(max_shard_gb=limit / 1e9))
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert len(files) > 10
    held = {file: load_file(tmp_path / "out" / file) for file in files}
    assert {name: file for file in files for name in held[file]} == index["weight_map"]
    sizes = [sum(tensor.nbytes for tensor in held[file].values()) for file in files]
    assert sum(sizes) == index["metadata"]["total_size"] == 4 * ours.config.parameter_counts()[0]
    assert max(sizes) <= limit


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"),
    [
        ([3, 3, 3], 6, [2, 1]),
        ([7, 1, 1], 6, [1, 2]),
        ([1, 9, 1], 6, [1, 1, 1]),
        ([1], 6, [1]),
        ([2, 2, 2], 6, [3]),
    ],
)
def test_plan_shards(sizes: list[int], limit: int, expected: list[int]) -> None:
    slices = plan_shards(sizes, limit)
    assert [len(sizes[part]) for part in slices] == expected
    assert [size for part in slices for size in sizes[part]] == sizes


class TestTarget:
    def test_refused_settings_leave_nothing(self, tmp_path: Path) -> None:
        router = replace(ROUTER, mask_rule="paper")
        with pytest.raises(ValueError, match=r"router\.mask_rule: paper"):
            export_model(random_model(router=router), router, None, tmp_path / "out", _FP32)
        assert not any(tmp_path.iterdir())

    def test_existing_needs_overwrite(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        export_model(random_model(), ROUTER, None, out, ExportOptions(max_shard_gb=1e-4))
        before = sorted(path.name for path in out.iterdir())
        with pytest.raises(ValueError, match="--overwrite"):
            export_model(random_model(), ROUTER, None, out, _FP32)
        assert sorted(path.name for path in out.iterdir()) == before
        export_model(random_model(), ROUTER, None, out, ExportOptions(overwrite=True))
        assert len(list(out.glob("*.safetensors"))) == 1, "the old shards are gone"
        assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing is left beside it"

    def test_foreign_folder_is_never_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(ValueError, match="not an earlier export"):
            export_model(random_model(), ROUTER, None, tmp_path, ExportOptions(overwrite=True))
        assert (tmp_path / "notes.txt").read_text() == "mine"

    def test_failure_leaves_the_old_export(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        out = tmp_path / "out"
        export_model(random_model(), ROUTER, None, out, _FP32)
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        monkeypatch.setattr(folder, "_CHECK_TOLERANCE", 0.0)
        with pytest.raises(ValueError, match="logits differ"):
            export_model(random_model(), ROUTER, None, out, ExportOptions(overwrite=True, check=True))
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    @pytest.mark.parametrize("size", [0.0, -1.0, float("nan")])
    def test_shard_size(self, size: float, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="--max_shard_gb"):
            export_model(random_model(), ROUTER, None, tmp_path / "out", ExportOptions(max_shard_gb=size))


def test_check_finds_other_weights(tmp_path: Path) -> None:
    ours = random_model()
    export_model(ours, ROUTER, None, tmp_path / "out", _FP32)
    assert folder.check_export(tmp_path / "out", ours, torch.float32) < 1e-5
    with torch.no_grad():
        ours.layers[1].moe.experts.gate_up_proj[2, 41, 3] += 1e-3
    with pytest.raises(ValueError, match=r"layers\.1\.block_sparse_moe\.experts\.2\.w3"):
        folder.check_export(tmp_path / "out", ours, torch.float32)


class TestCommands:
    @pytest.fixture
    def saved(self, tmp_path: Path) -> Path:
        model = random_model()
        run = {"model": asdict(model.config), "router": asdict(ROUTER), "data": {"tokenizer": None}}
        store.save_model(tmp_path / "run/checkpoints/step_00000007", model, run)
        return tmp_path / "run"

    def test_there_and_back(self, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        exported, imported = tmp_path / "hf", tmp_path / "imported"
        arguments = ["--checkpoint", str(saved), "--out", str(exported), "--check", "--max_shard_gb=0.0001"]
        assert run_command("export-hf", arguments) == 0
        assert "logits within" in capsys.readouterr().out
        assert run_command("export-hf", [*arguments[:4], "--overwrite", "true", "--check", "false"]) == 0
        assert "logits within" not in capsys.readouterr().out
        assert run_command("import-hf", ["--source", str(exported), "--out", str(imported)]) == 0
        before, after = store.load_model(saved)[0], store.load_model(imported)[0]
        for name, parameter in before.named_parameters():
            assert torch.equal(parameter, after.get_parameter(name)), name

    def test_recipe_describes_the_import_to_train(self, saved: Path, tmp_path: Path) -> None:
        exported, imported = tmp_path / "hf", tmp_path / "imported"
        assert run_command("export-hf", ["--checkpoint", str(saved), "--out", str(exported)]) == 0
        assert run_command("import-hf", ["--source", str(exported), "--out", str(imported)]) == 0
        run, _ = parse_config(["--config", str(imported / "recipe.yaml"), f"--train.init_from={imported}"])
        assert (run.model, run.router) == (replace(BASE, preset="grin_tiny (changed)"), ROUTER)
        assert "preset" not in yaml.safe_load((imported / "recipe.yaml").read_text())["model"]

    @pytest.mark.parametrize(
        ("command", "arguments", "message"),
        [
            ("export-hf", ["--checkpoint={saved}/nothing", "--out={tmp}/x"], "neither a checkpoint"),
            ("export-hf", ["--checkpoint={saved}", "--out={saved}"], "exists; pass --overwrite"),
            ("export-hf", ["--checkpoint={saved}", "--out={tmp}/x", "--tokenizer={tmp}/no.model"], "no.model"),
            ("import-hf", ["--source={tmp}/nothing", "--out={tmp}/x"], "it has no config.json"),
            ("import-hf", ["--source={saved}", "--out={saved}"], "exists already"),
        ],
    )
    def test_errors_are_one_line(
        self, command: str, arguments: list[str], message: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run_command(command, [argument.format(saved=saved, tmp=tmp_path) for argument in arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert not (tmp_path / "x").exists()

    def test_run_s_own_tokenizer_is_gone(self, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = saved / "checkpoints/step_00000007/checkpoint.json"
        content = json.loads(path.read_text())
        content["run"]["data"]["tokenizer"] = "gone/tokenizer.model"
        path.write_text(json.dumps(content))
        assert run_command("export-hf", ["--checkpoint", str(saved), "--out", str(saved / "x")]) == 2
        assert "gone/tokenizer.model is not a file; name the tokenizer by --tokenizer" in capsys.readouterr().err


def test_tokenizer_larger_than_model(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pieces must not exceed model\.vocab_size \(131\)"):
        export_model(random_model(), ROUTER, framed(small_tokenizer, TokenSource()), tmp_path / "out", _FP32)


def test_ids_and_tokenizer_reach_the_export(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = random_model(replace(BASE, vocab_size=small_tokenizer.vocab_size + 7))
    export_model(model, ROUTER, framed(small_tokenizer, TokenSource()), tmp_path / "out", _FP32)
    loaded = _load(tmp_path / "out")
    assert (loaded.config.bos_token_id, loaded.config.eos_token_id) == (1, 2)
    assert (loaded.generation_config.eos_token_id, loaded.generation_config.pad_token_id) == (2, 2)
    shutil.rmtree(tmp_path / "out")
    export_model(model, ROUTER, None, tmp_path / "out", _FP32)
    loaded = _load(tmp_path / "out")
    assert loaded.config.bos_token_id is None
    assert loaded.config.eos_token_id is None
