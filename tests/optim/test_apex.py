"""Which extension of apex each part asks for, and when apex is taken; the names are those of apex's setup.py."""

import pytest
import torch

from megagrin.models.transformer import ModelConfig, Transformer
from megagrin.moe.router import RouterConfig
from megagrin.optim import apex, optimizer
from megagrin.optim.optimizer import OptimConfig

SMALL = ModelConfig(n_layers=1, d_model=8, n_heads=2, n_kv_heads=1, head_dim=4, d_ff=4, n_experts=2, vocab_size=16)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, torch.dtype, str]]:
    """Questions to `apex_problem`, which finds nothing wrong."""
    found: list[tuple[str, torch.dtype, str]] = []

    def no_problem(*question: object) -> str:
        found.append(question)  # type: ignore[arg-type]
        return ""

    monkeypatch.setattr(apex, "apex_problem", no_problem)
    return found


def test_the_choice_decides(asked: list[tuple[str, torch.dtype, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    example = torch.empty(0, dtype=torch.bfloat16)
    assert not apex.use_apex("torch", "optim.fused_adam", "amp_C", example)
    assert asked == []
    assert apex.use_apex("auto", "optim.fused_adam", "amp_C", example)
    assert apex.use_apex("apex", "optim.fused_adam", "amp_C", example)
    assert asked == 2 * [("cpu", torch.bfloat16, "amp_C")]
    monkeypatch.setattr(apex, "apex_problem", lambda *_: "is not here")
    assert not apex.use_apex("auto", "optim.fused_adam", "amp_C", example)
    with pytest.raises(ValueError, match=r"^optim\.fused_adam: apex is not here; use auto or torch$"):
        apex.use_apex("apex", "optim.fused_adam", "amp_C", example)


@pytest.mark.parametrize(
    ("device", "dtype", "answer"),
    [
        ("cpu", torch.float32, "runs on CUDA devices only, and this run is on cpu"),
        ("cuda", torch.float64, "does not compute in fp64"),
        ("cuda", torch.bfloat16, "cannot be imported (apex, amp_C not found)"),
    ],
)
def test_what_is_wrong_with_apex_here(device: str, dtype: torch.dtype, answer: str) -> None:
    if answer.startswith("cannot") and apex.importlib.util.find_spec("apex") is not None:
        pytest.skip("apex is installed")
    assert apex.apex_problem(device, dtype, "amp_C").startswith(answer)


def test_each_part_needs_its_own_extension(asked: list[tuple[str, torch.dtype, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """FusedAdam is in amp_C, FusedLayerNorm in fused_layer_norm_cuda."""
    model = Transformer(SMALL, RouterConfig())
    monkeypatch.setattr(optimizer, "ApexAdam", lambda *arguments: arguments)
    listed, lr, betas, eps = optimizer._build_adamw(list(model.named_parameters()), OptimConfig(fused_adam="apex"))
    assert (lr, betas, eps) == (OptimConfig().lr, (0.9, 0.95), 1e-8)
    assert {group["weight_decay"] for group in listed} == {0.0, OptimConfig().weight_decay}
    monkeypatch.setattr(apex, "ApexLayerNorm", lambda norm: torch.nn.Identity())
    apex.fuse_layer_norms(model, "apex", torch.device("cpu"))
    assert [question[2] for question in asked] == ["amp_C", "fused_layer_norm_cuda"]
    assert not any(isinstance(module, torch.nn.LayerNorm) for module in model.modules())
    asked.clear()
    apex.fuse_layer_norms(model, "torch", torch.device("cpu"))
    assert asked == []
    monkeypatch.setattr(apex, "apex_problem", lambda *_: "is not here")
    with pytest.raises(ValueError, match=r"^engine\.layer_norm: apex "):
        apex.fuse_layer_norms(model, "apex", torch.device("cpu"))
