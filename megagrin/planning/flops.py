"""What a token of training costs and what a device can do: the two sides of MFU."""

import functools
import logging
import re
import time

import torch

from megagrin.models.transformer import ModelConfig

log = logging.getLogger(__name__)

# Products to measure a peak by begin within this time.
MEASURING_S = 1.0


def forward_flops_per_token(model: ModelConfig, seq_len: int) -> dict[str, float]:
    """FLOPs of one forward pass per token, by term; a multiply-add is two FLOPs.

    ==============  ===========================================================================
    attention       n_layers · 2 · d_model · head_dim · (2 · n_heads + 2 · n_kv_heads): q, o and k, v
    attention_core  n_layers · 4 · n_heads · head_dim · keys: scores and their sum over values
    experts         n_layers · top_k · 6 · d_model · d_ff: the three matrices of SwiGLU
    router          n_layers · 2 · d_model · n_experts; none in a dense model
    lm_head         2 · d_model · vocab_size
    ==============  ===========================================================================

    `keys` is the exact mean, over the positions of a sequence, of the keys that a causal query attends to:
    min(position + 1, window). Lookups, norms, softmax, activations and document boundaries are not counted.

    Args:
        model: dimensions that fit together (`ModelConfig.violations`).
        seq_len: positions of a sequence, at least 1.
    """
    reach = min(model.window, seq_len)
    keys = (reach * (reach + 1) // 2 + (seq_len - reach) * reach) / seq_len
    layers, d_model, heads = model.n_layers, model.d_model, 2 * (model.n_heads + model.n_kv_heads)
    return {
        "attention": layers * 2.0 * d_model * model.head_dim * heads,
        "attention_core": layers * 4.0 * model.n_heads * model.head_dim * keys,
        "experts": layers * (model.top_k if model.is_moe else 1) * 6.0 * d_model * model.d_ff,
        "router": layers * 2.0 * d_model * model.n_experts,
        "lm_head": 2.0 * d_model * model.vocab_size,
    }


def flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Training FLOPs per token: three forward passes' worth, as the backward of a product is two products of its size.

    Recomputed activations are not counted: they are work of this implementation, not of the model.
    """
    return 3.0 * sum(forward_flops_per_token(model, seq_len).values())


def model_flops_utilization(tokens_per_second: float, token_flops: float, devices: int, device_peak: float) -> float:
    """MFU: model FLOP/s of the whole run over the peak of all its devices; 0 to 1.

    Args:
        tokens_per_second: of the whole run, not of one device.
        token_flops: training FLOPs per token.
        devices: number of devices of the run.
        device_peak: FLOP/s of one device.
    """
    return tokens_per_second * token_flops / (devices * device_peak)


# Dense peaks in TFLOP/s: (bf16 and fp16 tensor cores, TF32, fp32), from the makers' data sheets (half of the figures
# given "with sparsity"). The first line whose words are all in the device's name counts.
_PEAKS: tuple[tuple[str, tuple[float, float, float]], ...] = (
    ("A100", (312.0, 156.0, 19.5)),
    ("H100 PCIE", (756.5, 378.0, 51.0)),
    ("H100 NVL", (835.5, 417.5, 60.0)),
    ("H100", (989.5, 494.5, 67.0)),
    ("H200 NVL", (835.5, 417.5, 60.0)),
    ("H200", (989.5, 494.5, 67.0)),
    ("GH200", (989.5, 494.5, 67.0)),
    ("B200", (2250.0, 1125.0, 75.0)),
    ("GB200", (2500.0, 1250.0, 80.0)),
    ("L40S", (362.0, 183.0, 91.6)),
    ("MI300X", (1307.4, 653.7, 163.4)),
)
# V100 has tensor cores for fp16 only: no entry for bf16, which it emulates.
_V100_PEAKS = (("V100S PCIE", 130.0, 16.4), ("V100 PCIE", 112.0, 14.0), ("V100", 125.0, 15.7))


def listed_peak_flops(device_name: str, dtype: torch.dtype, tf32: bool = False) -> float | None:
    """Dense peak of a known device in FLOP/s; None for an unknown one, a slice (MIG), or a dtype it has no unit for.

    Args:
        device_name: as the driver gives it, e.g. "NVIDIA H100 80GB HBM3".
        dtype: operands of the matrix products.
        tf32: fp32 products run as TF32.
    """
    words = set(re.split(r"[^A-Z0-9]+", device_name.upper()))
    if "MIG" in words:
        return None
    for name, fp16, fp32 in _V100_PEAKS:
        if words.issuperset(name.split()):
            return {torch.float16: fp16 * 1e12, torch.float32: fp32 * 1e12}.get(dtype)
    for name, (half, tensor_float, single) in _PEAKS:
        if words.issuperset(name.split()):
            full = tensor_float if tf32 else single
            return {torch.bfloat16: half * 1e12, torch.float16: half * 1e12, torch.float32: full * 1e12}.get(dtype)
    return None


def peak_flops(device: torch.device | str, dtype: torch.dtype, peak_tflops: float | None = None) -> float:
    """Dense peak of one device in FLOP/s: as configured, else by the device's name, else measured, with a log line.

    Args:
        device: of this process. A CPU counts with the threads torch uses in this process.
        dtype: compute dtype of the matrix products. fp32 on a GPU counts as TF32 where torch is set to use it.
        peak_tflops: `MetricsConfig.peak_tflops`.
    """
    if peak_tflops is not None:
        return peak_tflops * 1e12
    device = torch.device(device)
    if device.type == "cuda":
        tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
        listed = listed_peak_flops(torch.cuda.get_device_name(device), dtype, tf32)
        if listed is not None:
            return listed
    return measured_peak_flops(device, dtype)


@functools.cache
def measured_peak_flops(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Rate of the best of up to five size × size matrix products, in FLOP/s; measured once per process, device and dtype."""
    if size is None:
        size = 1024 if device.type == "cpu" else 8192
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    seconds: list[float] = []
    # A CPU that has no instructions for bf16 takes 2.4 s a product of 1024.
    while len(seconds) < 5 and sum(seconds) < MEASURING_S:
        start = time.perf_counter()
        torch.mm(left, right)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds.append(time.perf_counter() - start)
    peak = 2.0 * size**3 / min(seconds)
    log.warning(
        "no peak is listed for this device (%s, %s): MFU is relative to %.3g TFLOP/s, measured by a %d × %d matrix "
        "product; metrics.peak_tflops sets it",
        *(device.type, str(dtype).removeprefix("torch."), peak / 1e12, size, size),
    )
    return peak
