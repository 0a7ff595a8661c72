"""`megagrin convert-checkpoint`: between native checkpoints and DeepSpeed's own files: weights, moments and load fractions.

DeepSpeed's files belong to a layout: they are read and written by a job of that layout. A native checkpoint belongs to none, so
that DeepSpeed → native → DeepSpeed is also the way from one of its layouts to another.
"""

import dataclasses
from pathlib import Path
from typing import Any

from megagrin import config
from megagrin.checkpoint import store
from megagrin.checkpoint.store import CheckpointInfo
from megagrin.distributed.mesh import build_mesh
from megagrin.distributed.runtime import session, world_size_from_environment
from megagrin.training import rules
from megagrin.training.run_config import RunConfig
from megagrin.training.trainer import build_engine

DESCRIPTION = """Convert a checkpoint to the other format: a native one to DeepSpeed's own files, or these to a native one.

The run's settings come from the checkpoint; --parallel.… and --engine.… give the layout of DeepSpeed's files if it differs."""


def main(argv: list[str]) -> int:
    """`megagrin convert-checkpoint --from RUN_OR_CHECKPOINT --to RUN [--parallel.ep 8 …]`.

    Raises:
        ValueError: no checkpoint, settings that do not fit, or files of another layout.
    """

    def add_options(parser: Any) -> None:
        parser.add_argument("--from", type=str, default="", help="checkpoint folder, or run folder (its newest checkpoint)")
        parser.add_argument("--to", type=str, default="", help="run folder that gets the converted checkpoint")

    given = config.peek(argv, "from")
    source = None if given is None else store.find(Path(given))
    info = None if source is None else store.read_info(source)
    saved = {} if info is None else {key: value for key, value in config.flatten(info.run).items() if not isinstance(value, dict)}

    def defaults(_: Any) -> dict[str, Any]:
        return saved | ({} if info is None else {"engine.kind": "deepspeed"})

    run, options = config.parse(RunConfig, argv, "megagrin convert-checkpoint", DESCRIPTION, defaults, add_options)
    if source is None or info is None:
        raise ValueError("--from: a checkpoint or run folder must be given")
    if not options.to:
        raise ValueError("--to: a run folder for the converted checkpoint must be given")
    to: store.Format = "native" if store.format_of(source) == "deepspeed" else "deepspeed"
    run = dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, format=to))
    config.check(rules.violations(run, world_size_from_environment()))
    convert(run, source, info, Path(options.to))
    return 0


def convert(run: RunConfig, source: Path, info: CheckpointInfo, output: Path) -> Path:
    """Read `source` into a DeepSpeed engine and write it in the format that it has not.

    Returns:
        The new checkpoint.
    """
    if any(path.name == source.name for path in store.checkpoints(output)):
        raise ValueError(f"--to: {output} has a checkpoint of step {info.step} already")
    with session(run.runtime) as runtime:
        engine = build_engine(run, build_mesh(run.parallel, runtime.device.type), runtime.device)
        engine.load(source, info.step)
        new = dataclasses.replace(info, run=dataclasses.asdict(run))
        path = store.commit(output, new, lambda folder: engine.save(folder, run.checkpoint.format))
        if runtime.is_main:
            print(f"{run.checkpoint.format} checkpoint of step {info.step} in {path}")
    return path
