"""One op of kernels/ forward and backward, kernels against the PyTorch reference, at a ragged small shape and at target shapes.

    python benchmarks/gpu_op.py sparsemixer [--smoke]

Ends with status 1 where results differ. Only the kernels of this op, and of those that it launches, are on: the process that
fails names the op at fault. Run by gpu_probe.py, which also notices a process that dies or hangs.

Shape suffixes: T tokens, K experts per token, R routed rows, E experts, D model width, F expert width, V vocabulary.
"""

import argparse
import faulthandler
import os
import sys
from collections.abc import Callable
from pathlib import Path

import device_memory
import torch
from moe_contestants import Inputs, build, ours
from moe_shapes import MoEShape
from torch import Tensor

from megagrin.kernels.backend import LAUNCHES, OPS
from megagrin.kernels.cross_entropy import linear_cross_entropy
from megagrin.kernels.grouped_gemm import k_grouped_wgrad, m_grouped, m_grouped_dgrad
from megagrin.kernels.permute import permute, sort_by_expert, unpermute
from megagrin.moe.router import Draws, Router, RouterConfig

SMALL = MoEShape("small", 333, 136, 72, 5, 2)
# Half of GRIN's experts, and a layer of many narrow ones: all ops are probed side by side, in one device's memory.
TARGETS = (MoEShape("grin", 4096, 4096, 6400, 8, 2), MoEShape("fine", 4096, 2048, 768, 128, 8))
VOCAB = {"small": 1003, "grin": 32064, "fine": 1024}
# Norm of the difference over the norm: sums in another order, one more or one less rounding; the reference rounds a weight
# gradient to bf16 before it widens it (1.7e-3 seen). Broken kernels are looked for; tests/gpu judges the last bits.
TOLERANCE = {torch.bfloat16: 1.5e-2, torch.float32: 5e-3, torch.int64: 0.0}
Results = dict[str, Tensor]


def _normal(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device, dtype=dtype).mul_(scale)


def _grouped_gemm(shape: MoEShape, generator: torch.Generator, dtype: torch.dtype) -> Callable[[], Results]:
    counts_E = torch.full((shape.n_experts,), shape.rows // shape.n_experts, device=generator.device)
    counts_E[0] += shape.rows - counts_E.sum()
    counts_E[1], counts_E[2] = counts_E[1] + counts_E[2] - 1, 1
    x_RD, dy_RF = (_normal(generator, shape.rows, width, dtype=dtype) for width in (shape.d_model, shape.d_ff))
    w_EFD = _normal(generator, shape.n_experts, shape.d_ff, shape.d_model, dtype=dtype)

    def results() -> Results:
        found = {"y": m_grouped(x_RD, w_EFD, counts_E), "dx": m_grouped_dgrad(dy_RF, w_EFD, counts_E)}
        found["dw"] = k_grouped_wgrad(dy_RF, x_RD, counts_E)
        into_EFD = torch.ones_like(w_EFD, dtype=torch.float32)
        k_grouped_wgrad(dy_RF, x_RD, counts_E, accumulate_into=into_EFD)
        return found | {"dw added": into_EFD}

    return results


def _moe_mlp(shape: MoEShape, generator: torch.Generator, dtype: torch.dtype) -> Callable[[], Results]:
    problem = build(shape, "learned", generator.device, dtype, n_sets=1)
    inputs: Inputs = problem.sets[0]
    leaves = (inputs.x_TD, problem.gate_up_E2FD, problem.down_EDF, inputs.weight_TK)

    def results() -> Results:
        y_TD = ours(problem.gate_up_E2FD, problem.down_EDF, inputs.x_TD, inputs)
        gradients = torch.autograd.grad(y_TD, leaves, inputs.dy_TD)
        return {"y": y_TD.detach(), **dict(zip(("dx", "d gate_up", "d down", "d weight"), gradients, strict=True))}

    return results


def _permute(shape: MoEShape, generator: torch.Generator, dtype: torch.dtype) -> Callable[[], Results]:
    uniform_TE = torch.rand(shape.tokens, shape.n_experts, generator=generator, device=generator.device)
    expert_TK = uniform_TE.argsort(1)[:, : shape.top_k].contiguous()
    x_TD = _normal(generator, shape.tokens, shape.d_model, dtype=dtype).requires_grad_()

    def results() -> Results:
        plan = sort_by_expert(expert_TK, shape.n_experts)
        y_TD = unpermute(permute(x_TD, plan), plan)
        (dx_TD,) = torch.autograd.grad(y_TD, x_TD, x_TD.detach())
        return {"source": plan.source_R, "place": plan.place_TK, "counts": plan.counts_E, "y": y_TD.detach(), "dx": dx_TD}

    return results


def _router(shape: MoEShape, generator: torch.Generator, config: RouterConfig) -> tuple[Router, Draws]:
    router = Router(shape.d_model, shape.n_experts, shape.top_k, 3, config).to(generator.device)
    with torch.no_grad():
        router.weight.copy_(_normal(generator, shape.n_experts, shape.d_model, scale=shape.d_model**-0.5))
    return router, Draws(7, 70000, torch.arange(shape.tokens, device=generator.device))


def _sparsemixer(shape: MoEShape, generator: torch.Generator, dtype: torch.dtype) -> Callable[[], Results]:
    router, draws = _router(shape, generator, RouterConfig())
    x_TD = _normal(generator, shape.tokens, shape.d_model)
    d_TK = _normal(generator, shape.tokens, shape.top_k)

    def results() -> Results:
        _, routing = router(x_TD, draws)
        (dw_ED,) = torch.autograd.grad(routing.weight_TK, router.weight, d_TK)
        return {"expert": routing.expert_TK, "weight": routing.weight_TK.detach(), "dw": dw_ED}

    return results


def _router_logits(shape: MoEShape, generator: torch.Generator, dtype: torch.dtype) -> Callable[[], Results]:
    router, draws = _router(shape, generator, RouterConfig(forced_balance=True))
    x_TD = _normal(generator, shape.tokens, shape.d_model, dtype=dtype).requires_grad_()
    dz_TE = _normal(generator, shape.tokens, shape.n_experts)

    def results() -> Results:
        z_TE, _ = router(x_TD, draws)
        dx_TD, dw_ED = torch.autograd.grad(z_TE, (x_TD, router.weight), dz_TE)
        return {"z": z_TE.detach(), "dx": dx_TD, "dw": dw_ED}

    return results


def _cross_entropy(shape: MoEShape, generator: torch.Generator, dtype: torch.dtype) -> Callable[[], Results]:
    vocab = VOCAB[shape.name]
    x_TD = _normal(generator, shape.tokens, shape.d_model, dtype=dtype).requires_grad_()
    w_VD = _normal(generator, vocab, shape.d_model, dtype=dtype, scale=shape.d_model**-0.5).requires_grad_()
    b_V = _normal(generator, vocab, dtype=dtype).requires_grad_()
    label_T = torch.randint(vocab, (shape.tokens,), generator=generator, device=generator.device)
    label_T[::7] = -100

    def results() -> Results:
        loss = linear_cross_entropy(x_TD, w_VD, b_V, label_T)
        gradients = torch.autograd.grad(loss, (x_TD, w_VD, b_V))
        return {"loss": loss.detach(), **dict(zip(("dx", "dw", "db"), gradients, strict=True))}

    return results


Case = Callable[[MoEShape, torch.Generator, torch.dtype], Callable[[], Results]]
CASES: dict[str, Case] = {
    "grouped_gemm": _grouped_gemm,
    "moe_mlp": _moe_mlp,
    "permute": _permute,
    "sparsemixer": _sparsemixer,
    "cross_entropy": _cross_entropy,
    "router_logits": _router_logits,
}


def differences(found: Results, expected: Results) -> list[str]:
    """What is too far from the reference, in words."""
    wrong = []
    for name, value in found.items():
        reference = expected[name].float()
        distance = float((value.float() - reference).norm() / reference.norm().clamp_min(1e-30))
        limit = TOLERANCE[value.dtype]
        if not distance <= limit:  # NaN is too far
            wrong.append(f"{name} is off by {distance:.2g}, allowed {limit:.2g}")
    return wrong


def check(op: str, shape: MoEShape, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Kernels and reference on the same tensors; the kernels run twice, as the second launch takes another path."""
    results = CASES[op](shape, torch.Generator(device).manual_seed(1), dtype)
    others = set(OPS) - {op, *LAUNCHES.get(op, ())}
    os.environ["MEGAGRIN_KERNELS"] = ",".join(["auto", *(f"-{other}" for other in sorted(others))])
    results()
    found = results()
    os.environ["MEGAGRIN_KERNELS"] = "torch"
    return differences(found, results())


def main(argv: list[str]) -> int:
    """Check all shapes of one op; the last line that is printed says where it stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", choices=sorted(CASES))
    parser.add_argument("--smoke", action="store_true", help="the small shape only, on the CPU")
    options = parser.parse_args(argv)
    if not (Path(__file__).resolve().parents[1] / "kernels" / f"{options.op}.py").exists():
        print(f"{options.op}: there is no such op yet")
        return 0
    if not options.smoke and not torch.cuda.is_available():
        print("gpu_op: torch sees no CUDA device; --smoke runs on a CPU", file=sys.stderr)
        return 2
    faulthandler.dump_traceback_later(20, repeat=True)  # a probe that runs out of its time leaves where it was
    device_memory.cap()
    device, wrong = torch.device("cpu" if options.smoke else "cuda"), []
    # Each shape is compiled anew, and the expert MLP has the most kernels: tests/gpu has its many experts.
    targets = TARGETS[:1] if options.op == "moe_mlp" else TARGETS
    for shape in (SMALL,) if options.smoke else (SMALL, *targets):
        print(f"{options.op}: {shape.name} shape", flush=True)
        found = check(options.op, shape, device, torch.bfloat16)
        wrong += [f"{options.op}, {shape.name} shape: {what}" for what in found]
    print("\n".join(wrong) or f"{options.op}: agrees with the reference", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
