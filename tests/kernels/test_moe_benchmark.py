"""The MoE benchmark on the CPU: its arithmetic against docs/kernels.md, that all contestants compute the same, its verdicts."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import moe_contestants
import moe_published
import moe_report
import moe_shapes
import pytest
import timing
import torch
from moe_shapes import SHAPES, SMOKE_SHAPES, MoEShape

ROOT = Path(__file__).resolve().parents[2]

A_8K = MoEShape("grin-8k", 8192, 4096, 6400, 16, 2)
A_32K, B_32K, WIDE = SHAPES[0], SHAPES[2], SHAPES[3]
B_8K = MoEShape("fine-8k", 8192, 2048, 768, 128, 8)
# Shape, row tiles of 128 and steps of 64 of the routing behind the table; microseconds of each kernel on whole tiles and waves,
# then TFLOP/s forward and with backward: the design's table, worked out apart from this code.
TABLE = [
    (A_8K, 136, 263, (2332, 1191, 47, 1166, 2383, 47, 1117, 2235), (722, 735)),
    (A_32K, 521, 1031, (8881, 4485, 187, 4440, 8971, 187, 4380, 8761), (761, 767)),
    (B_8K, 574, 1092, (606, 294, 70, 303, 589, 70, 281, 562), (638, 669)),
    (B_32K, 2122, 4166, (2175, 1085, 281, 1088, 2170, 281, 1072, 2144), (699, 721)),
    (WIDE, 1057, 2081, (5786, 2893, 312, 2893, 5786, 312, 2848, 5674), (734, 747)),
]


@pytest.mark.parametrize(
    ("shape", "m_tiles", "k_steps", "expected_us", "expected_tflops"), TABLE, ids=lambda v: getattr(v, "name", "")
)
def test_roofline(
    shape: MoEShape, m_tiles: int, k_steps: int, expected_us: tuple[int, ...], expected_tflops: tuple[int, int]
) -> None:
    bounds = moe_shapes.roofline(shape, m_tiles, k_steps)
    assert [round(bound.quantised_us) for bound in bounds.values()] == list(expected_us)
    assert tuple(round(rate) for rate in moe_shapes.bound_tflops(shape, bounds)) == expected_tflops
    assert all(bound.quantised_us >= bound.ideal_us for bound in bounds.values())


def test_fp32_accumulation_costs_what_the_table_says() -> None:
    bounds = moe_shapes.roofline(A_8K, 136, 263, wgrad_bytes=8)
    assert [round(bounds[name].gigabytes, 2) for name in ("down wgrad", "up wgrad")] == [3.7, 7.26]


def test_flops_are_those_of_the_products() -> None:
    """Counted by torch while the reference layer runs: forward and backward, padding nowhere."""
    from torch.utils.flop_counter import FlopCounterMode

    for shape in SMOKE_SHAPES:
        problem = moe_contestants.build(shape, "learned", torch.device("cpu"), torch.float32, n_sets=1)
        contestant = next(c for c in moe_contestants.CONTESTANTS if c.name == "cuBLAS loop")
        layer = moe_contestants.Layer(contestant, problem)
        weighting = 2 * shape.rows * shape.d_model  # the weighted sum of a token's rows is a product, too
        with FlopCounterMode(display=False) as counter:
            layer.forward(0)
        assert counter.get_total_flops() == shape.forward_flops + weighting
        with FlopCounterMode(display=False) as counter:
            layer.forward_backward(0)
        assert counter.get_total_flops() == shape.forward_flops + shape.backward_flops + 3 * weighting


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_routings_are_what_they_are_called(shape: MoEShape) -> None:
    loads = {}
    for kind in moe_shapes.ROUTINGS:
        expert_TK, weight_TK = moe_shapes.route(shape, kind, seed=0)
        assert expert_TK.shape == weight_TK.shape == (shape.tokens, shape.top_k)
        assert (expert_TK.sort(1).values.diff(dim=1) > 0).all(), "a token has an expert twice"
        torch.testing.assert_close(weight_TK.sum(1), torch.ones(shape.tokens))
        loads[kind] = torch.bincount(expert_TK.flatten(), minlength=shape.n_experts).double()
    assert len(set(loads["balanced"].tolist())) == 1
    spread = float(loads["learned"].log().std())
    assert 0.15 < spread < 0.45, spread
    other = moe_shapes.route(shape, "learned", seed=1)[0]
    assert not torch.equal(moe_shapes.route(shape, "learned", seed=0)[0], other)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, str]:
    """Record, markdown and output of a smoke run."""
    folder = tmp_path_factory.mktemp("benchmark")
    command = [sys.executable, "benchmarks/moe_layer.py", "--smoke", "--rounds", "1", "--pause", "0", "--out", str(folder)]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(folder)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "moe_layer.json").read_text()), (folder / "moe_layer.md").read_text(), done.stdout


def test_contestants_compute_the_same(smoke: tuple[dict[str, Any], str, str]) -> None:
    record, text, output = smoke
    assert [(case["shape"]["name"], case["routing"]) for case in record["cases"]] == [
        (shape.name, routing) for routing in moe_shapes.ROUTINGS for shape in SMOKE_SHAPES
    ]
    for case in record["cases"]:
        for name in ("megagrin", "torch._grouped_mm", "cuBLAS loop"):
            assert case["contestants"][name]["error"] is None, (case["shape"]["name"], name)
        for name in ("scattermoe", "grouped_gemm", "triton_kernels"):
            assert case["contestants"][name]["error"] == f"{name} is not installed"
            assert f"| {name} | {name} is not installed |" in text
    assert output.count("megagrin: agrees") == len(record["cases"])


def test_nothing_measured_on_a_cpu_meets_or_misses_a_goal(smoke: tuple[dict[str, Any], str, str]) -> None:
    record, text, _ = smoke
    assert {goal["verdict"] for goal in record["goals"]} == {"unmeasured"}
    assert "| met |" not in text
    assert "| wide-32k | SonicMoE | H100 | 596 | 587 | – |" in text
    for part in ("## Goals", "torch:", "command:", "learned routing", "balanced routing", "Roofline", "kernel alone"):
        assert part.replace(":", "") in text, part


def test_published_figures_belong_to_a_shape_and_name_gpu_and_source() -> None:
    assert {row.shape for row in moe_published.PUBLISHED} <= {shape.name for shape in SHAPES}
    for row in moe_published.PUBLISHED:
        assert row.who
        assert row.gpu
        assert row.source
        assert row.backward is None or row.total is None


def test_a_wrong_contestant_is_not_timed() -> None:
    expected = {"y": torch.ones(4), "dx": torch.ones(4)}
    found = moe_contestants.differences({"y": torch.ones(4), "dx": torch.full((4,), 1.1)}, expected)
    assert moe_contestants.disagreement(found, torch.bfloat16) == "differs from ours: dx by 0.1"
    found = moe_contestants.differences({"y": torch.full((4,), float("nan"))}, expected)
    assert "differs" in str(moe_contestants.disagreement(found, torch.bfloat16))
    assert moe_contestants.disagreement({"y": 1e-3}, torch.bfloat16) is None


def case(shape: MoEShape, ours_ms: float, peer_ms: float) -> dict[str, Any]:
    """A case in which the dense products take 9 and 30 ms."""
    dense = {"forward": 9e-3, "total": 30e-3}
    contestants = {
        "megagrin": moe_report.rates(shape, {"forward": ours_ms / 3e3, "total": ours_ms / 1e3}, dense),
        "torch._grouped_mm": moe_report.rates(shape, {"forward": peer_ms / 3e3, "total": peer_ms / 1e3}, dense),
        "gone": {"error": "gone is not installed"},
    }
    kernels = [{"kernel": "up", "flops": 1.0, "seconds": {"megagrin": 1.0, "torch._grouped_mm": 1.09}}]
    return {
        "shape": {"name": shape.name},
        "routing": "learned",
        "contestants": contestants,
        "kernels": kernels,
        "overhead_share": 0.06,
    }


def test_verdicts() -> None:
    record = {"device_type": "cuda", "cases": [case(A_32K, 30.0, 45.0)]}
    verdicts = {goal["goal"]: goal["verdict"] for goal in moe_report.goals(record, SHAPES)}
    assert verdicts["grin-32k: forward, share of dense"] == "met"  # 9 of 10 ms
    assert verdicts["grin-32k: forward + backward, share of dense"] == "met"
    assert verdicts["grin-32k: times torch._grouped_mm, layer forward + backward"] == "missed"  # 1.5 of 1.6
    assert verdicts["grin-32k: times torch._grouped_mm, kernel up"] == "met"
    assert verdicts["grin-32k: router + permutation + combine, share of the forward (at most)"] == "missed"
    assert verdicts["grin-8k: forward, share of dense"] == "unmeasured"
    assert not any("gone" in name for name in verdicts)
    slow = {goal["goal"]: goal["verdict"] for goal in moe_report.goals({**record, "cases": [case(A_32K, 40.0, 45.0)]}, SHAPES)}
    assert slow["grin-32k: forward, share of dense"] == "missed"


def test_interleaving_turns_the_order_and_the_inputs() -> None:
    order: list[tuple[str, int]] = []

    def contestant(name: str) -> Any:
        def call(number: int) -> None:
            order.append((name, number))

        return call

    timing._MOST_REPEATS, kept = 1, timing._MOST_REPEATS
    try:
        found = timing.interleaved({name: contestant(name) for name in "abc"}, torch.device("cpu"), rounds=3, pause_s=0)
    finally:
        timing._MOST_REPEATS = kept
    assert set(found) == set("abc")
    assert [name for name, _ in order[6:]] == list("abcbcacab")
    assert [number for name, number in order[6:] if name == "a"] == [1, 2, 3]


@pytest.mark.parametrize("seconds", ["1e9", "-1"])
def test_a_case_that_fails_or_has_no_time_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: str
) -> None:
    import moe_layer

    whole = moe_layer.measure

    def fails_once(shape: MoEShape, routing: str, *rest: Any) -> dict[str, Any]:
        if (shape.name, routing) == ("smoke-2", "learned"):
            raise RuntimeError("an illegal memory access")
        return whole(shape, routing, *rest)

    monkeypatch.setattr(moe_layer, "measure", fails_once)
    options = ["--smoke", "--rounds", "1", "--pause", "0", "--contestant", "cuBLAS loop", "--seconds", seconds]
    status = moe_layer.main([*options, "--out", str(tmp_path)])
    record = json.loads((tmp_path / "moe_layer.json").read_text())
    done = [(case["shape"]["name"], case["routing"]) for case in record["cases"]]
    if seconds == "-1":
        assert (status, done) == (0, [])
        assert record["left_out"][0] == "smoke-2, learned: out of time"
        assert len(record["left_out"]) == 4
    else:
        assert (status, done) == (1, [("smoke-1", "learned"), ("smoke-2", "balanced"), ("smoke-1", "balanced")])
        assert record["left_out"] == ["smoke-2, learned: RuntimeError: an illegal memory access"]
        assert all(list(case["contestants"]) == ["megagrin", "cuBLAS loop"] for case in record["cases"])
