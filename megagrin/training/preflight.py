"""What a run needs of this machine and its files, looked at before a rank starts: by a dry run, and by each start.

What the configuration alone tells is in rules.py. Here nothing is written but a file that is gone at once, and no GPU is touched.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from megagrin.data.checks import file_violations
from megagrin.data_prep.indexed import IndexedDataset
from megagrin.data_prep.tokenizer import Tokenizer
from megagrin.distributed.runtime import device_type
from megagrin.engines.base import DTYPES
from megagrin.engines.builds import CPU_OPERATORS, OFFLOAD_OPERATORS, stale_locks
from megagrin.nn.attention import backend_problem
from megagrin.observe.metrics import FILE_NAME, read_metrics
from megagrin.optim.apex import apex_problem
from megagrin.settings.arguments import about, require_folder
from megagrin.training.resume import initial_weights, newest, resume_violations
from megagrin.training.run_config import RunConfig


def violations(run: RunConfig) -> list[str]:
    """Every reason why a run whose rules hold would be refused after its start, as `section.field: value and rule`."""
    sizes = {"seq_len": run.train.seq_len, "eval_samples": run.train.eval_samples}
    broken = file_violations(run.data, vocab_size=run.model.vocab_size, **sizes)
    files_are_good = not broken
    broken += [*_refusals(lambda: _tokenizer(run)), *_refusals(lambda: _folders(run))]
    broken += [*_refusals(lambda: _weights(run, files_are_good)), *_refusals(lambda: _metrics(run)), *_devices(run)]
    return [*dict.fromkeys(broken), *_operators(run)]


def slowness(run: RunConfig) -> str:
    """What will make a run much slower than it need be on this machine, as `section.field: value and reason`; empty without."""
    if run.engine.dtype == "bf16" and device_type(run.runtime.device) == "cpu" and not multiplies_bf16():
        return "engine.dtype: bf16 is many times slower than fp32 on this CPU, which has no instructions for it; take fp32"
    return ""


def multiplies_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices faster than torch's plain loops (x86: AVX-512 at least).

    The quickstart asks for more: hardware on which bf16 is the faster one. Without AVX-512 a step of grin_tiny on 4096 tokens
    took 30 s of processor time in bf16 and 2.2 s in fp32 (torch 2.13, AVX2).
    """
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is None or bool(supported())


def _refusals(check: Callable[[], list[str]]) -> list[str]:
    try:
        return check()
    except ValueError as error:
        return [str(error)]


def _tokenizer(run: RunConfig) -> list[str]:
    """The tokenizer is a tokenizer; without a sidecar nothing else says so before a prompt is to be continued."""
    path = run.data.tokenizer
    if path is None or not Path(path).is_file():  # missing files are named with the token files
        return []
    with about("data.tokenizer"):
        pieces = Tokenizer.load(path).vocab_size
    if pieces > run.model.vocab_size:
        return [f"data.tokenizer: {path}: {pieces} pieces must not exceed model.vocab_size ({run.model.vocab_size})"]
    return []


def _folders(run: RunConfig) -> list[str]:
    require_folder("train.run_dir", Path(run.train.run_dir) / "checkpoints")
    if run.engine.nvme_path is not None:
        require_folder("engine.nvme_path", run.engine.nvme_path)
    return []


def _weights(run: RunConfig, files_are_good: bool) -> list[str]:
    found = newest(run)
    if found is None:
        initial_weights(run)
        return []
    assert run.data.train is not None, "rules.violations has a rule"
    fingerprint = IndexedDataset(run.data.train).fingerprint() if files_are_good else found[1].data
    return resume_violations(run, *found, fingerprint)


def _metrics(run: RunConfig) -> list[str]:
    """The record that a resumed run appends to; one rank reads it, as it may be long."""
    path = Path(run.train.run_dir) / FILE_NAME
    if path.exists() and os.environ.get("RANK", "0") == "0":
        with about("train.run_dir"):
            read_metrics(path)
    return []


def _devices(run: RunConfig) -> list[str]:
    """Libraries and kernels that this machine does not have, and ranks without a GPU of their own."""
    kind = device_type(run.runtime.device)
    broken = []
    if problem := backend_problem(run.engine.attention, kind):
        broken.append(problem)
    dtype = torch.promote_types(DTYPES[run.engine.dtype], torch.float32)
    for setting, choice, extension in (
        ("optim.fused_adam", run.optim.fused_adam, "amp_C"),
        ("engine.layer_norm", run.engine.layer_norm, "fused_layer_norm_cuda"),
    ):
        if choice == "apex" and (problem := apex_problem(kind, dtype, extension)):
            broken.append(f"{setting}: apex {problem}; use auto or torch")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if kind == "cuda" and local > torch.cuda.device_count():
        broken.append(
            f"runtime.device: {run.runtime.device} gives each rank a GPU, but {local} ranks run on this node with "
            f"{torch.cuda.device_count()} GPUs; start as many ranks per node as there are GPUs, or set runtime.device=cpu"
        )
    return broken


def _operators(run: RunConfig) -> list[str]:
    """DeepSpeed's operators are compiled at their first use: those for offload, and on a CPU one for its collectives."""
    broken: list[str] = []
    if run.engine.kind != "deepspeed":
        return broken
    if device_type(run.runtime.device) == "cpu":
        broken += [f"engine.kind: deepspeed compiles an operator, and {problem}" for problem in stale_locks(CPU_OPERATORS)]
    if run.engine.offload_optimizer == "none":
        return broken
    setting = f"engine.offload_optimizer: {run.engine.offload_optimizer}"
    broken += [f"{setting} compiles an operator, and {problem}" for problem in stale_locks(OFFLOAD_OPERATORS)]
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        broken.append(f"{setting} compiles an operator, and there is no C++ compiler {compiler}; install one, or set CXX")
    return broken
