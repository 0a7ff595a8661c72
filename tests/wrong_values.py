"""The tables of tests/test_wrong_input.py: per setting values that it cannot have, and commands with options that they refuse.

A case is (arguments, what the answer must name). `{…}` in a text stands for a path, see `test_wrong_input.paths`.
"""

import types
from dataclasses import fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megagrin.training.run_config import RunConfig

Case = tuple[list[str], list[str]]

# By type: every setting of the type is given each of these.
OF_NO_TYPE: dict[Any, list[str]] = {
    int: ["x", "2.5", "", "1e3", "null", "[1]", "99999999999999999999"],
    float: ["x", "", "nan", "inf", "-.inf", "[0.1]"],
    bool: ["maybe", "2", ""],
    str: [""],
}
# Types whose numbers are wrong below these; None: every number of the type is allowed, or has an own case below.
TOO_SMALL = {
    "train.steps": "0",
    "train.seq_len": "-1",
    "train.global_batch_size": "0",
    "train.micro_batch_size": "0",
    "train.seed": "-1",
    "train.eval_interval": "-1",
    "train.eval_samples": "0",
    "model.vocab_size": "0",
    "model.n_layers": "0",
    "model.d_model": "-8",
    "model.n_heads": "0",
    "model.n_kv_heads": "0",
    "model.head_dim": "0",
    "model.d_ff": "0",
    "model.n_experts": "-1",
    "model.top_k": "0",
    "model.max_positions": "0",
    "model.window": "0",
    "model.rope_theta": "0",
    "model.norm_eps": "-1",
    "model.init_std": "0",
    "router.mask_eps": "0",
    "router.input_jitter": "-0.1",
    "balance.coef": "-1",
    "balance.z_coef": "-0.5",
    "data.num_workers": "-1",
    "optim.lr": "0",
    "optim.min_lr_ratio": "-0.1",
    "optim.warmup_steps": "-1",
    "optim.decay_fraction": "-0.1",
    "optim.beta1": "-0.1",
    "optim.beta2": "-0.1",
    "optim.eps": "0",
    "optim.muon_momentum": "-0.1",
    "optim.weight_decay": "-0.1",
    "optim.clip_norm": "-1",
    "parallel.tp": "0",
    "parallel.pp": "0",
    "parallel.cp": "-2",
    "parallel.ep": "0",
    "parallel.etp": "0",
    "parallel.ep_chunks": "0",
    "parallel.dp_replicate": "0",
    "parallel.pp_stages_per_rank": "0",
    "engine.recompute_budget_gib": "-1",
    "checkpoint.interval": "-1",
    "checkpoint.keep": "-1",
    "metrics.log_interval": "0",
    "metrics.load_interval": "0",
    "metrics.peak_tflops": "0",
    "runtime.timeout_minutes": "0",
}
TOO_LARGE = {
    "train.steps": "100000000",
    "router.mask_eps": "1",
    "router.input_jitter": "1",
    "optim.min_lr_ratio": "1.5",
    "optim.warmup_steps": "5",
    "optim.decay_fraction": "2",
    "optim.beta1": "1",
    "optim.beta2": "1",
    "optim.muon_momentum": "1",
    "model.top_k": "17",
    "data.num_workers": "100000",
    "runtime.timeout_minutes": "1000000000000",
    "train.seq_len": "2048",
    "parallel.tp": "3",
    "parallel.pp": "3",
    "parallel.ep": "3",
    "parallel.dp_replicate": "2",
    "parallel.ep_chunks": "2",
    "parallel.pp_stages_per_rank": "2",
}


def _settings() -> list[tuple[str, Any]]:
    sections = get_type_hints(RunConfig)
    return [
        (f"{section.name}.{name}", hint)
        for section in fields(RunConfig)
        for name, hint in get_type_hints(sections[section.name]).items()
    ]


def _plain(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        return next(argument for argument in get_args(hint) if argument is not type(None))
    return hint


def of_settings() -> list[Case]:
    """Values of no type and beyond the bounds, for each setting of a run that has such."""
    cases: list[Case] = []
    for key, hint in _settings():
        plain = _plain(hint)
        optional = plain is not hint
        if get_origin(plain) is Literal:
            values = ["nothing", ""]
        elif get_origin(plain) is tuple:
            values = ["x", "{a: 1}", "[nothing]"]
        else:
            values = [value for value in OF_NO_TYPE[plain] if not (optional and value == "null")]
        values += [table[key] for table in (TOO_SMALL, TOO_LARGE) if key in table]
        cases += [([f"--{key}={value}"], [key]) for value in values]
    return cases


RECIPES: list[tuple[str, list[str]]] = [
    ("", ["holds no settings"]),
    ("train: [1]", ["train: [1]"]),
    ("train: 5", ["train: 5"]),
    ("train: text", ["train: 'text'"]),
    ("- 1", ["must hold sections"]),
    ("text", ["must hold sections"]),
    ("train: [", ["not valid YAML"]),
    ("train: {steps: 1, steps: 2}", ["train.steps", "before"]),
    ("train: {steps: 1}\ntrain: {seed: 2}", ["train was given before"]),
    ("train: &a {steps: *a}", ["train.steps"]),
    ("train: &a {<<: *a, stps: 1}", ["train.stps"]),
    ("train: {steps: 2026-01-01}", ["train.steps"]),
    ("train: {run_dir: 5}", ["train.run_dir: 5"]),
    ("train: {run_dir: [a]}", ["train.run_dir: ['a']"]),
    ("optim: {lr: {a: 1}}", ["optim.lr: {'a': 1}"]),
    ("optim: {lr: !!python/object:os.system x}", ["not valid YAML"]),
    ("model: {preset: grin_large}", ["model.preset: grin_large"]),
    ("model: {preset: null, n_layers: null}", ["model.preset: null", "model.n_layers: null"]),
    ("1: {2: 3}", ["1.2: no such key"]),
    ("train: {1: 2}", ["train.1: no such key"]),
    ("dry_run: true", ["dry_run: no such key"]),
    ("a: 1\n---\nb: 2", ["not valid YAML"]),
    ("train: {\tsteps: 1", ["not valid YAML"]),
    ("\0", ["not valid YAML"]),
    ("engine: deepspeed", ["engine: 'deepspeed'"]),
    ("optim: {lr: .nan}", ["optim.lr: nan"]),
    ("optim: {betas: [.9, .95]}", ["optim.betas: no such key", "did you mean"]),
]

# `megagrin train`, beside settings: with --dry_run and without the same answer.
TRAIN: list[Case] = [
    (["--data.train={missing}"], ["data.train", "{missing}"]),
    (["--data.train={folder}"], ["data.train", "{folder}"]),
    (["--data.train={empty_tokens}"], ["data.train", "{empty_tokens}"]),
    (["--data.train={cut_tokens}"], ["data.train", "{cut_tokens}"]),
    (["--data.valid={missing}"], ["data.valid", "{missing}"]),
    (["--data.valid={other_tokens}"], ["data.valid", "{other_tokens}", "another tokenizer"]),
    (["--data.tokenizer={missing}"], ["data.tokenizer", "{missing}"]),
    (["--data.tokenizer={text}"], ["data.tokenizer", "{text}"]),
    (["--data.tokenizer={tokenizer}"], ["data.tokenizer", "{tokenizer}", "model.vocab_size"]),
    (
        ["--data.train={other_tokens}", "--data.tokenizer={tokenizer}", "--model.vocab_size=1000"],
        ["data.tokenizer", "another tokenizer"],
    ),
    (["--train.seq_len=1000"], ["data.train", "train.seq_len"]),
    (["--data.valid={tokens}", "--train.eval_samples=100000"], ["train.eval_samples: 100000"]),
    (["--model.vocab_size=50"], ["data.train", "model.vocab_size=50"]),
    (["--train.run_dir={text}"], ["train.run_dir", "{text}"]),
    (["--train.run_dir={text}/below"], ["train.run_dir", "{text}"]),
    (["--train.run_dir=missing/../run"], ["train.run_dir: missing/../run", "does not exist"]),
    (["--train.run_dir=/proc/run"], ["train.run_dir: /proc/run"]),
    (["--train.run_dir={run}", "--train.seed=9"], ["train.run_dir: {run}", "train.seed: 0 -> 9"]),
    (["--train.run_dir={run}", "--model.d_ff=24", "--optim.lr=1e-4"], ["train.run_dir: {run}", "model.d_ff: 16 -> 24"]),
    (["--train.run_dir={run}", "--data.train={second_tokens}"], ["train.run_dir: {run}", "data.train", "{second_tokens}"]),
    (["--train.run_dir={damaged_run}"], ["train.run_dir", "checkpoint.json"]),
    (["--train.run_dir={damaged_metrics}"], ["train.run_dir", "metrics.jsonl"]),
    (["--train.init_from={missing}"], ["train.init_from: {missing}"]),
    (["--train.init_from={folder}"], ["train.init_from: {folder}"]),
    (["--train.init_from={text}"], ["train.init_from: {text}"]),
    (["--train.init_from={run}", "--model.n_layers=3"], ["train.init_from", "n_layers: 2 -> 3"]),
    (["--train.init_from={damaged_run}"], ["train.init_from", "checkpoint.json"]),
    (["--engine.attention=flex"], ["engine.attention: flex"]),
    (["--engine.layer_norm=apex"], ["engine.layer_norm: apex"]),
    (["--optim.fused_adam=apex"], ["optim.fused_adam: apex"]),
    (["--runtime.device=cuda"], ["runtime.device: cuda"]),
    (["--optim.lr=inf", "--model.rope_theta=0", "--train.steps=x"], ["train.steps: 'x'"]),
    (["--optim.lr=inf", "--model.rope_theta=0"], ["optim.lr: inf", "model.rope_theta: 0"]),
    (["--model.n_heads=3"], ["model.n_heads: 3", "n_kv_heads"]),
    (["--model.head_dim=7"], ["model.head_dim: 7"]),
    (["--train.global_batch_size=3", "--train.micro_batch_size=2"], ["train.global_batch_size: 3"]),
    (["--router.forced_balance=true"], ["router.forced_balance: true"]),
    (["--checkpoint.format=deepspeed"], ["checkpoint.format: deepspeed"]),
    (["--engine.recompute=budget"], ["engine.recompute_budget_gib"]),
    (["--engine.recompute=selective", "--engine.recompute_parts=[]"], ["engine.recompute_parts"]),
    (["--engine.recompute_parts=[norms, nothing]"], ["engine.recompute_parts", "'nothing'"]),
    (["--engine.nvme_path={folder}"], ["engine.nvme_path: {folder}"]),
    (["--engine.offload_optimizer=cpu"], ["engine.offload_optimizer: cpu"]),
    (["--engine.deepspeed_config={text}"], ["engine.deepspeed_config: {text}"]),
    (["--parallel.pp_split=[1,1]"], ["parallel.pp_split: (1, 1)"]),
    (["--parallel.pp_schedule=zero_bubble", "--parallel.pp=2"], ["parallel.pp"]),
    (["--model.preset=grin"], ["model.preset: grin"]),
    (["--model=grin_tiny"], ["model:", "model.<key>"]),
    (["--model.n_layer=3"], ["model.n_layer: no such key", "model.n_layers"]),
    (["--steps=3"], ["steps: no such key", "train.steps"]),
    (["--dry-run"], ["dry-run: no such key", "dry_run"]),
    (["--train.steps"], ["train.steps: a value must follow"]),
    (["--config"], ["--config: a value must follow"]),
    (["--config={missing}"], ["--config: {missing}"]),
    (["--config={folder}"], ["--config: {folder}"]),
    (["--config={binary}"], ["--config: {binary}"]),
    (["word"], ["'word'"]),
    (["-x"], ["'-x'"]),
    (["--world_size=-1"], ["--world_size: -1"]),
    (["--world_size=0"], ["--world_size: 0"]),
    (["--world_size=two"], ["world_size: 'two'"]),
    (["--print_config=skip_null"], ["print_config: 'skip_null'"]),
]

COMMANDS: list[Case] = [
    (["train", "--world_size", "2"], ["--world_size: 2"]),
    (["train", "--dry_run=perhaps"], ["dry_run: 'perhaps'"]),
    (["generate"], ["--checkpoint", "--prompt"]),
    (["generate", "--checkpoint", "{run}"], ["--prompt"]),
    (["generate", "--checkpoint", "{missing}", "--prompt", "a"], ["--checkpoint: {missing}"]),
    (["generate", "--checkpoint", "", "--prompt", "a"], ["--checkpoint"]),
    (["generate", "--checkpoint", "{text}", "--prompt", "a"], ["--checkpoint: {text}"]),
    (["generate", "--checkpoint", "{damaged_run}", "--prompt", "a"], ["--checkpoint", "checkpoint.json"]),
    (["generate", "--checkpoint", "{run}", "--prompt", "a"], ["--checkpoint", "--tokenizer"]),
    (["generate", "--checkpoint", "{run}", "--prompt", "a", "--tokenizer", "{missing}"], ["--tokenizer: {missing}"]),
    (["generate", "--checkpoint", "{run}", "--prompt", "a", "--tokenizer", "{text}"], ["--tokenizer: {text}"]),
    (["generate", "--checkpoint", "{run}", "--prompt", "a", "--tokenizer", ""], ["--tokenizer"]),
    (["generate", "--checkpoint", "{run}", "--prompt", "a", "--tokenizer", "{tokenizer}"], ["--tokenizer", "model.vocab_size"]),
    (["generate", "--checkpoint", "{run}", "--prompt"], ["--prompt: a value must follow"]),
    *(
        (["generate", "--checkpoint", "{run}", "--prompt", "a", f"--{option}={value}"], [f"--{option}"])
        for option, values in {
            "max_new_tokens": ["0", "-1", "x", "1.5", "", "null"],
            "temperature": ["-1", "nan", "inf", "hot", ""],
            "top_p": ["0", "1.1", "nan", "x", "-0.1"],
            "seed": ["-1", "x", "18446744073709551616", "0.5"],
            "device": ["tpu", "", "cuda"],
            "stream": ["perhaps", "2"],
            "top_k": ["1"],
        }.items()
        for value in values
    ),
    (["export-hf"], ["--checkpoint", "--out"]),
    (["export-hf", "--checkpoint", "{run}"], ["--out"]),
    (["export-hf", "--checkpoint", "{missing}", "--out", "{new}"], ["--checkpoint: {missing}"]),
    (["export-hf", "--checkpoint", "{damaged_run}", "--out", "{new}"], ["--checkpoint", "checkpoint.json"]),
    (["export-hf", "--checkpoint", "{cut_run}", "--out", "{new}"], ["--checkpoint", "{cut_run}"]),
    (["export-hf", "--checkpoint", "{run}", "--out", "{missing}/../new"], ["--out: {missing}/..", "does not exist"]),
    (["export-hf", "--checkpoint", "{run}", "--out", "{folder}"], ["--out: {folder}"]),
    (["export-hf", "--checkpoint", "{run}", "--out", "{folder}", "--overwrite"], ["--out: {folder}"]),
    (["export-hf", "--checkpoint", "{run}", "--out", "{text}", "--overwrite", "true"], ["--out: {text}"]),
    (["export-hf", "--checkpoint", "{run}", "--out", "{text}/below"], ["--out", "{text}"]),
    (["export-hf", "--checkpoint", "{run}", "--out", "/proc/x/y"], ["--out", "/proc"]),
    (["export-hf", "--checkpoint", "{run}", "--out", ""], ["--out"]),
    (["export-hf", "--checkpoint", "{run}", "--out", "{new}", "--tokenizer", "{missing}"], ["--tokenizer: {missing}"]),
    (["export-hf", "--checkpoint", "{run}", "--out", "{new}", "--tokenizer", "{text}"], ["--tokenizer: {text}"]),
    *(
        (["export-hf", "--checkpoint", "{run}", "--out", "{new}", f"--{option}={value}"], [f"--{option}"])
        for option, values in {
            "dtype": ["float16", "", "1"],
            "max_shard_gb": ["0", "-1", "nan", "inf", "x", ""],
            "overwrite": ["perhaps", "2"],
            "check": ["perhaps", ""],
            "ouput": ["x"],
        }.items()
        for value in values
    ),
    (["import-hf"], ["--source", "--out"]),
    (["import-hf", "--source", "{missing}", "--out", "{new}"], ["--source", "{missing}"]),
    (["import-hf", "--source", "{folder}", "--out", "{new}"], ["--source", "{folder}"]),
    (["import-hf", "--source", "{text}", "--out", "{new}"], ["--source", "{text}"]),
    (["import-hf", "--source", "{broken_hf}", "--out", "{new}"], ["--source", "config.json"]),
    (["import-hf", "--source", "{empty_hf}", "--out", "{new}"], ["--source", "config.json"]),
    (["import-hf", "--source", "{folder}", "--out", "{folder}"], ["--out: {folder}"]),
    (["import-hf", "--source", "{folder}", "--out", "{text}"], ["--out: {text}"]),
    (["import-hf", "--source", "{folder}", "--out", "{text}/below"], ["--out", "{text}"]),
    (["import-hf", "--source", "{folder}", "--out"], ["--out: a value must follow"]),
    (["import-hf", "--source", "", "--out", "{new}"], ["--source"]),
    (["import-hf", "--sorce", "{folder}", "--out", "{new}"], ["--sorce", "--source"]),
    (["convert-checkpoint"], ["--from"]),
    (["convert-checkpoint", "--from", "{missing}", "--to", "{new}"], ["--from: {missing}"]),
    (["convert-checkpoint", "--from", "", "--to", "{new}"], ["--from"]),
    (["convert-checkpoint", "--from", "{text}", "--to", "{new}"], ["--from: {text}"]),
    (["convert-checkpoint", "--from", "{damaged_run}", "--to", "{new}"], ["--from", "checkpoint.json"]),
    (["convert-checkpoint", "--from", "{run}"], ["--to"]),
    (["convert-checkpoint", "--from", "{run}", "--to", ""], ["--to"]),
    (["convert-checkpoint", "--from", "{run}", "--to", "{new}", "--parallel.ep=x"], ["parallel.ep: 'x'"]),
    (["convert-checkpoint", "--from", "{run}", "--to", "{new}", "--parallel.ep=3"], ["parallel.ep: 3"]),
    (["convert-checkpoint", "--from", "{run}", "--to", "{new}", "--engine.zero=5"], ["engine.zero: '5'"]),
    (["convert-checkpoint", "--from", "{run}", "--to", "{new}", "--too=5"], ["too: no such key"]),
    (["convert-checkpoint", "--from"], ["from: a value must follow"]),
    (["plot"], ["--run"]),
    (["plot", "--run"], ["--run: a value must follow"]),
    (["plot", "--run", "{missing}"], ["--run", "{missing}"]),
    (["plot", "--run", "{folder}"], ["--run", "{folder}"]),
    (["plot", "--run", "{text}"], ["--run", "{text}"]),
    (["plot", "--run", "{damaged_metrics}"], ["--run", "{damaged_metrics}"]),
    (["plot", "--run", "{run}", "--out", "{text}"], ["--out", "{text}"]),
    (["plot", "--run", "{run}", "--out", "{text}/below"], ["--out", "{text}"]),
    (["plot", "--run", "{run}", "word"], ["'word'"]),
    *((["plot", "--run", "{run}", f"--last={value}"], ["--last"]) for value in ("0", "-3", "x", "1.5", "")),
    (["kernels"], ["tune"]),
    (["kernels", "tone"], ["tone"]),
    (["kernels", "tune", "--preset", "dense_tiny"], ["--preset: dense_tiny"]),
    (["kernels", "tune", "--preset"], ["--preset"]),
    (["kernels", "tune", "--shape", "1x2x3"], ["--shape: '1x2x3'"]),
    (["kernels", "tune", "--shape", "1x2x3x4x5"], ["--shape: '1x2x3x4x5'"]),
    (["kernels", "tune", "--shape", "1x2x3x0x1"], ["--shape: '1x2x3x0x1'"]),
    (["kernels", "tune", "--shape", "²x2x3x4x1"], ["--shape: '²x2x3x4x1'"]),
    (["kernels", "tune", "--shape", ""], ["--shape: ''"]),
    (["kernels", "tune", "--tokens", "0"], ["--tokens: 0"]),
    (["kernels", "tune", "--tokens", "8", "x"], ["--tokens: 'x'"]),
    (["kernels", "tune", "--tokens"], ["--tokens: a value must follow"]),
    (["kernels", "tune", "--out", "{text}"], ["--out", "{text}"]),
    (["kernels", "tune", "--out", "/proc/x"], ["--out: /proc/x"]),
    *((["kernels", "tune", f"--seconds={value}"], ["--seconds"]) for value in ("0", "-1", "nan", "inf", "x", "")),
    (["kernels", "tune", "--sahpe", "1"], ["--sahpe", "--shape"]),
]
