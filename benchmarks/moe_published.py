"""What others have published for the benchmark's shapes: quoted beside the measurements, never in their place.

Figures in TFLOP/s of the whole layer in bf16, on the GPU that is named. An H100 SXM and an H200 have the same multiprocessors and
power class; the H200 has more memory bandwidth, so that it has the advantage wherever memory limits.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One published measurement.

    Attributes:
        shape: name of the benchmark's shape.
        who: implementation.
        gpu: where it was measured.
        forward: TFLOP/s of the forward pass.
        backward: of the backward pass alone, or None.
        total: of both together, or None.
        source: where it is published, and how it was read.
    """

    shape: str
    who: str
    gpu: str
    forward: float
    backward: float | None
    total: float | None
    source: str


_SONIC = "bar chart in SonicMoE's repository (arXiv 2512.14080), read off to ± 5"
_LIGER = "linkedin/Liger-Kernel pull request 1294, peak"
_VEOMNI = "ByteDance-Seed/VeOmni pull request 460"
PUBLISHED = (
    Published("wide-32k", "SonicMoE", "H100", 596, 587, None, _SONIC),
    Published("wide-32k", "DeepGEMM with SonicMoE's gather and sum", "H100", 574, 443, None, _SONIC),
    Published("wide-32k", "DeepGEMM with PyTorch around it", "H100", 548, 420, None, _SONIC),
    Published("wide-32k", "MoMoE", "H100", 465, 368, None, _SONIC),
    Published("wide-32k", "scattermoe", "H100", 386, 370, None, _SONIC),
    Published("wide-32k", "MegaBlocks", "H100", 366, 386, None, _SONIC),
    Published("wide-32k", "Megatron, grouped", "H100", 340, 315, None, _SONIC),
    Published("fine-32k", "liger-kernel, fused MoE", "H100", 501, None, 413, _LIGER),
    Published("fine-32k", "VeOmni on torch._grouped_mm", "H100", 242, None, None, _VEOMNI),
    Published("fine-32k", "VeOmni on its Triton kernels", "H100", 215, None, None, _VEOMNI),
)


def published_lines() -> list[str]:
    """A markdown table of them."""
    lines = ["| shape | layer | GPU | fwd TFLOP/s | bwd | fwd+bwd | source |", "|---|---|---|---|---|---|---|"]
    for row in PUBLISHED:
        rates = " | ".join("–" if rate is None else f"{rate:.0f}" for rate in (row.forward, row.backward, row.total))
        lines.append(f"| {row.shape} | {row.who} | {row.gpu} | {rates} | {row.source} |")
    return lines
