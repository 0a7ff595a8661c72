"""The recipes for clusters are built for real on a fake process group, for the first and the last rank of every stage."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megagrin.distributed.comm import local_tensor
from megagrin.distributed.mesh import build_mesh
from megagrin.models.transformer import Transformer
from megagrin.parallel.pipeline import stage_parts
from megagrin.parallel.plan import parallelize
from megagrin.parallel.recompute import Recompute
from megagrin.training import rules
from megagrin.training.run_config import RunConfig, parse_config

RECIPES = sorted((Path(__file__).parents[2] / "launch" / "recipes").glob("*gpu*.yaml"))


@pytest.fixture(autouse=True)
def _no_group_left() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def _held(run: RunConfig, ranks: int, rank: int) -> int:
    """Elements of all parameters that a rank holds, after every dimension has been applied."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        mesh = build_mesh(run.parallel, "cpu")
        parts = stage_parts(run.model, run.parallel)[mesh.rank("pp") :: mesh.size("pp")]
        with torch.device("meta"):
            stages = [Transformer(run.model, run.router, run.balance, part) for part in parts]
        recompute = Recompute(run.engine.recompute, run.engine.recompute_parts)
        for stage in stages:
            parallelize(stage, mesh, torch.bfloat16, run.engine.zero == 3, recompute, run.engine.compile)
        return sum(local_tensor(parameter).numel() for stage in stages for parameter in stage.parameters())
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_builds(recipe: Path) -> None:
    """Every rank holds its share: the model over the ranks of a copy, but for what is padded or too small to share."""
    run, _ = parse_config(["--config", str(recipe), "--data.train=tokens"])
    ranks = int(re.search(r"_(\d+)gpu", recipe.stem).group(1))  # type: ignore[union-attr]
    assert rules.violations(run, ranks) == []
    stage = ranks // run.parallel.pp
    total, _ = run.model.parameter_counts()
    for offset in (0, stage - 1):
        held = sum(_held(run, ranks, number * stage + offset) for number in range(run.parallel.pp))
        assert held * stage / run.parallel.dp_replicate == pytest.approx(total, rel=0.01)
