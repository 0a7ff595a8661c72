"""`megagrin convert-checkpoint`: between native checkpoints and DeepSpeed's own files: weights, moments and load fractions.

DeepSpeed's files belong to a layout: they are read and written by a job of that layout. A native checkpoint belongs to none, so
that DeepSpeed → native → DeepSpeed is also the way from one of its layouts to another.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megagrin.checkpoint import store
from megagrin.checkpoint.store import CheckpointInfo
from megagrin.distributed.mesh import build_mesh
from megagrin.distributed.runtime import session, world_size_from_environment
from megagrin.engines.builds import bounded_builds
from megagrin.settings import config
from megagrin.settings.arguments import require_folder
from megagrin.training import rules
from megagrin.training.run_config import RunConfig, name_shape
from megagrin.training.trainer import build_engine

DESCRIPTION = """Convert a checkpoint to the other format: a native one to DeepSpeed's own files, or these to a native one.

The run's settings come from the checkpoint; --parallel.… and --engine.… give the layout of DeepSpeed's files if it differs."""


OPTIONS = {
    "from": config.Option(str, "", "checkpoint folder, or run folder (its newest checkpoint)"),
    "to": config.Option(str, "", "run folder that gets the converted checkpoint"),
}


def main(argv: list[str]) -> int:
    """`megagrin convert-checkpoint --from RUN_OR_CHECKPOINT --to RUN [--parallel.ep 8 …]`.

    Raises:
        ValueError: no checkpoint, settings that do not fit, or files of another layout.
    """

    found: list[tuple[Path, CheckpointInfo]] = []

    def settings(look: Callable[[str], Any]) -> dict[str, Any]:
        if not look("from"):
            raise ValueError("--from: a checkpoint or run folder must be given")
        with config.about("--from"):
            source = store.find(Path(look("from")))
            found.append((source, store.read_info(source)))
        sections = found[0][1].run.items()
        saved = {f"{section}.{key}": value for section, keys in sections for key, value in keys.items()}
        return saved | {"engine.kind": "deepspeed"}

    run, options = config.parse(RunConfig, argv, "megagrin convert-checkpoint", DESCRIPTION, settings, OPTIONS, name_shape)
    source, info = found[0]
    if not options["to"]:
        raise ValueError("--to: a run folder for the converted checkpoint must be given")
    to: store.Format = "native" if store.format_of(source) == "deepspeed" else "deepspeed"
    run = dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, format=to))
    config.check(rules.violations(run, world_size_from_environment()))
    convert(run, source, info, Path(options["to"]))
    return 0


def convert(run: RunConfig, source: Path, info: CheckpointInfo, output: Path) -> Path:
    """Read `source` into a DeepSpeed engine and write it in the format that it has not.

    Returns:
        The new checkpoint.
    """
    if any(path.name == source.name for path in store.checkpoints(output)):
        raise ValueError(f"--to: {output} has a checkpoint of step {info.step} already")
    require_folder("--to", output / "checkpoints")
    with session(run.runtime) as runtime:
        with bounded_builds(run.runtime.timeout_minutes * 60):
            engine = build_engine(run, build_mesh(run.parallel, runtime.device.type), runtime.device)
        engine.load(source, info.step)
        new = dataclasses.replace(info, run=dataclasses.asdict(run))
        path = store.commit(output, new, lambda folder: engine.save(folder, run.checkpoint.format))
        if runtime.is_main:
            print(f"{run.checkpoint.format} checkpoint of step {info.step} in {path}")
    return path
