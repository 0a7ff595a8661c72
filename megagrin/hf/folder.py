"""`megagrin export-hf` and `megagrin import-hf`: checkpoints to and from Hugging Face's `PhimoeForCausalLM`.

Weights travel tensor by tensor through safetensors; transformers itself is needed for `--check` only, and its tokenizers library
for the tokenizer. What the fields and tensors correspond to is in megagrin/hf/mapping.py.

Shape suffixes: B sequences, S positions, V vocabulary.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megagrin.checkpoint import store
from megagrin.hf.mapping import Layout, from_hf_config, hf_views, stored_shape, to_hf_config
from megagrin.hf.tokenizer import generation_config, read_tokenizer, write_tokenizer
from megagrin.inference.vocabulary import Vocabulary, check_size, load_vocabulary
from megagrin.models.transformer import ModelConfig, Transformer
from megagrin.moe.router import RouterConfig
from megagrin.settings import config
from megagrin.settings.arguments import about, require_folder
from megagrin.settings.commands import CommandParser

_CONFIG, _INDEX, _SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_READABLE = {"F32", "BF16", "F16"}
# Of the largest logit. Differences from the order of summation are below 1e-5; another weight or mask is far above.
_CHECK_TOLERANCE = 1e-3
_CHECK_SEQUENCES, _CHECK_POSITIONS = 2, 128
# --check as well as --check true
_FLAG: dict[str, Any] = {"type": bool, "nargs": "?", "const": True, "default": False}


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """How an export is written.

    Attributes:
        dtype: of the stored weights; float32 is exact.
        max_shard_gb: largest weight file in 10^9 bytes; a tensor beyond that gets a file of its own.
        overwrite: replace an earlier export at the same place.
        check: load the export with transformers and compare logits before it is put in place.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    max_shard_gb: float = 5.0
    overwrite: bool = False
    check: bool = False

    def violations(self) -> list[str]:
        """Every broken rule, as `option: value and rule`."""
        broken = []
        if self.dtype not in _DTYPES:
            broken.append(f"--dtype: {self.dtype} is none of {', '.join(_DTYPES)}")
        if not 0 < self.max_shard_gb < float("inf"):
            broken.append(f"--max_shard_gb: {self.max_shard_gb} must be a positive finite number")
        return broken


def export_model(
    model: Transformer, router: RouterConfig, vocabulary: Vocabulary | None, out: Path, options: ExportOptions
) -> float | None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` loads without remote code; it appears when it is whole.

    Args:
        model: weights on the CPU.
        router: the run's router configuration.
        vocabulary: its tokenizer goes into the folder as well, and puts bos in front of a text where training did; None leaves
            it out.
        out: the folder to create.
        options: see `ExportOptions`.

    Returns:
        Largest absolute difference of logits to transformers, or None without `options.check`.

    Raises:
        ValueError: an option or a setting that transformers cannot represent, `out` exists, or the check failed.
        ImportError: transformers or tokenizers is missing where it is needed.
    """
    fields = check_request(model.config, router, vocabulary, out, options)
    with _committed(out) as folder:
        _write_json(folder / _CONFIG, fields)
        _write_json(folder / "generation_config.json", generation_config(vocabulary, model.config.vocab_size))
        _write_weights(model, folder, _DTYPES[options.dtype], options.max_shard_gb * 1e9)
        if vocabulary is not None:
            write_tokenizer(vocabulary, folder, model.config.max_positions)
        return check_export(folder, model, _DTYPES[options.dtype]) if options.check else None


def check_request(
    model: ModelConfig, router: RouterConfig, vocabulary: Vocabulary | None, out: Path, options: ExportOptions
) -> dict[str, Any]:
    """Everything that can be refused before weights are read.

    Returns:
        The content of config.json.

    Raises:
        ValueError: an option or a setting that transformers cannot represent, `out` exists, or the tokenizer has more pieces than
            the model has rows.
    """
    config.check(options.violations())
    _check_target(out, options.overwrite)
    if vocabulary is not None:
        check_size(vocabulary.tokenizer, model.vocab_size, "--tokenizer")
    ids = generation_config(vocabulary, model.vocab_size)
    # Not pad_token_id: transformers would freeze that row of the embedding, which is eos's, in further training.
    return to_hf_config(model, router, bos_id=ids["bos_token_id"], eos_id=ids["eos_token_id"], dtype=options.dtype)


def _check_target(out: Path, overwrite: bool) -> None:
    """Refuse a target that would destroy something, or cannot be written, before any work is done."""
    require_folder("--out", out.parent)
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise ValueError(f"--out: {out} exists; pass --overwrite to replace an earlier export")
    if not out.is_dir() or (any(out.iterdir()) and not (out / _CONFIG).is_file()):
        raise ValueError(f"--out: {out} is not an earlier export (a folder with {_CONFIG}); it is not replaced")


@contextmanager
def _committed(out: Path) -> Iterator[Path]:
    """A hidden folder that takes the place of `out` when the block ends, and vanishes when it raises."""
    out = out.resolve()
    partial, replaced = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.replaced")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if out.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            out.rename(replaced)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def plan_shards(sizes: list[int], limit: float) -> list[slice]:
    """Cut a list of tensor sizes into consecutive runs of at most `limit` bytes; a larger tensor is a run of its own."""
    cuts, used = [0], 0
    for place, size in enumerate(sizes):
        if place > cuts[-1] and used + size > limit:
            cuts.append(place)
            used = 0
        used += size
    return [slice(start, end) for start, end in zip(cuts, [*cuts[1:], len(sizes)], strict=True)]


def _write_weights(model: Transformer, folder: Path, dtype: torch.dtype, limit: float) -> None:
    """Memory beyond the model: one file's worth of the tensors whose dtype or row order changes."""
    views = list(hf_views(model, "released"))
    sizes = [view.numel() * dtype.itemsize for _, view in views]
    shards = plan_shards(sizes, limit)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: view.to(dtype).contiguous() for name, view in views[shard]}
        try:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder / file}: cannot be written: {error}") from error
        weight_map |= dict.fromkeys(tensors, file)
        del tensors  # before those of the next file are made
    _write_json(folder / _INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map})


def check_export(folder: Path, model: Transformer, dtype: torch.dtype) -> float:
    """Read an export back twice: by `import_model`, bit for bit, and by transformers, logits against logits in fp32.

    Args:
        folder: the export.
        model: what was exported.
        dtype: as which its weights were stored.

    Returns:
        Largest absolute difference of logits.

    Raises:
        ImportError: transformers is missing.
        ValueError: a tensor, the list of tensors or the logits differ.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ImportError("--check needs transformers: pip install 'megagrin[hf]'") from error
    ours, _ = import_model(folder)
    read = dict(hf_views(ours, "released"))
    if damaged := [name for name, view in hf_views(model, "released") if not torch.equal(view.to(dtype).float(), read[name])]:
        raise ValueError(f"--check: {folder} holds other values than the model in {', '.join(damaged[:3])}")
    # eager experts: transformers' grouped_mm, its default, refuses widths that are no multiple of 16 bytes.
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager", output_loading_info=True
    )
    theirs, report = loaded
    if keys := {kind: sorted(report[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[kind]}:
        raise ValueError(f"--check: transformers loads {folder} with {keys}")
    length = min(ours.config.max_positions, _CHECK_POSITIONS)
    generator = torch.Generator().manual_seed(0)
    tokens_BS = torch.randint(ours.config.vocab_size, (_CHECK_SEQUENCES, length), generator=generator)
    with torch.inference_mode():
        logits_BSV, expected_BSV = ours(tokens_BS).logits_BSV, theirs.eval()(tokens_BS, use_cache=False).logits
    difference = (logits_BSV - expected_BSV).abs().max().item()
    largest = expected_BSV.abs().max().item()
    if not difference <= _CHECK_TOLERANCE * largest:
        raise ValueError(
            f"--check: logits differ from transformers' by {difference:.3g}, more than {_CHECK_TOLERANCE} of the largest "
            f"({largest:.3g})"
        )
    return difference


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold an object, not a {type(content).__name__}")
    return content


def _weight_map(source: Path) -> dict[str, str] | None:
    """Tensor name to file name from the index; None where all tensors are in one file.

    Raises:
        ValueError: no safetensors weights, or an index that names files outside the folder.
    """
    if (source / _INDEX).is_file():
        weight_map = _read_json(source / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError(f"{source / _INDEX}: weight_map must map tensor names to file names")
        if outside := sorted({file for file in weight_map.values() if Path(file).name != file or not file}):
            raise ValueError(f"{source / _INDEX}: {outside[0]!r} is not the name of a file beside it")
        return weight_map
    if (source / _SINGLE).is_file():
        return None
    if any(source.glob("*.bin")) or any(source.glob("*.pt")):
        raise ValueError(
            f"{source}: its weights are pickles, which can run code when they are read; convert them to safetensors first "
            "(transformers: save_pretrained)"
        )
    raise ValueError(f"{source}: has neither {_INDEX} nor {_SINGLE}")


def _open_tensors(source: Path, stack: ExitStack) -> dict[str, Any]:
    """For every stored tensor the open file that holds it; files are mapped, not read."""
    weight_map = _weight_map(source)
    files = [_SINGLE] if weight_map is None else sorted(set(weight_map.values()))
    opened: dict[str, Any] = {}
    for file in files:
        try:
            opened[file] = stack.enter_context(safe_open(source / file, framework="pt"))
        except SafetensorError as error:
            raise ValueError(f"{source / file}: not a whole safetensors file: {error}") from error
    held = {file: set(handle.keys()) for file, handle in opened.items()}
    if weight_map is None:
        return dict.fromkeys(held[_SINGLE], opened[_SINGLE])
    if absent := sorted(name for name, file in weight_map.items() if name not in held[file]):
        raise ValueError(f"{source / weight_map[absent[0]]}: lacks {absent[0]}, which {_INDEX} places there")
    return {name: opened[file] for name, file in weight_map.items()}


def _check_tensors(source: Path, stored: dict[str, Any], expected: dict[str, Tensor]) -> None:
    broken = [f"{name}: missing" for name in sorted(expected.keys() - stored.keys())]
    broken += [f"{name}: unexpected" for name in sorted(stored.keys() - expected.keys())]
    for name in sorted(expected.keys() & stored.keys()):
        header = stored[name].get_slice(name)
        if header.get_shape() != stored_shape(expected[name]):
            broken.append(f"{name}: shape {header.get_shape()} must be {stored_shape(expected[name])}")
        if header.get_dtype() not in _READABLE:
            broken.append(f"{name}: dtype {header.get_dtype()} is none of {', '.join(sorted(_READABLE))}")
    shown = 8
    if len(broken) > shown:
        broken = [*broken[:shown], f"and {len(broken) - shown} more"]
    config.check([f"{source}: {line}" for line in broken])


def import_model(source: Path) -> tuple[Transformer, RouterConfig]:
    """Read a folder with config.json and safetensors weights in either layout, sharded or not.

    Args:
        source: the folder; fp32, bf16 and fp16 weights are widened to fp32 exactly.

    Returns:
        An fp32 model on the CPU in eval mode, and its router configuration.

    Raises:
        ValueError: pickled or damaged weights, tensors that are missing, unexpected or of another shape, or a configuration
            that megagrin cannot represent; lists everything that does not fit.
        OSError: a file cannot be read.
    """
    if not (source / _CONFIG).is_file():
        raise ValueError(f"--source: {source} is not a Hugging Face model folder: it has no {_CONFIG}")
    model_config, router = from_hf_config(_read_json(source / _CONFIG))
    with torch.device("meta"):
        model = Transformer(model_config, router)
    with ExitStack() as stack:
        stored = _open_tensors(source, stack)
        # Rotary frequencies are not weights, but old exports of other tools carry them.
        stored = {name: file for name, file in stored.items() if not name.endswith("rotary_emb.inv_freq")}
        layout: Layout = "fused" if any(".mlp." in name for name in stored) else "released"
        _check_tensors(source, stored, dict(hf_views(model, layout)))
        model.to_empty(device="cpu")
        for name, view in hf_views(model, layout):
            view.copy_(stored[name].get_tensor(name).view(view.shape))
    return model.eval(), router


def main_export(argv: list[str]) -> int:
    """`megagrin export-hf --checkpoint RUN_OR_CHECKPOINT --out DIR`.

    Raises:
        ValueError, OSError, ImportError: see `export_model`.
    """
    parser = CommandParser(prog="megagrin export-hf", description="Write a checkpoint as a PhimoeForCausalLM folder.")
    parser.add_argument("--checkpoint", type=str, required=True, help="checkpoint folder, or run folder (its newest checkpoint)")
    parser.add_argument("--out", type=str, required=True, help="folder to create")
    parser.add_argument("--tokenizer", type=str | None, default=None, help="SentencePiece model (default: data.tokenizer)")
    parser.add_argument("--dtype", type=Literal["float32", "bfloat16"], default="float32", help="of the stored weights")
    parser.add_argument("--max_shard_gb", type=float, default=5.0, help="largest weight file, 10^9 bytes")
    parser.add_argument("--overwrite", **_FLAG, help="replace an earlier export")
    parser.add_argument("--check", **_FLAG, help="load the export with transformers and compare logits")
    arguments = parser.parse_args(argv)
    options = ExportOptions(arguments.dtype, arguments.max_shard_gb, arguments.overwrite, arguments.check)
    config.check(options.violations())
    out = Path(arguments.out)
    _check_target(out, options.overwrite)
    with about("--checkpoint"):
        path = store.find(Path(arguments.checkpoint))
        info = store.read_info(path)
    vocabulary = load_vocabulary(arguments.tokenizer, path, info)
    router = RouterConfig(**info.run["router"])
    check_request(ModelConfig(**info.run["model"]), router, vocabulary, out, options)
    with about("--checkpoint"):
        model, _ = store.load_model(path)
    difference = export_model(model, router, vocabulary, out, options)
    remarks = ["" if vocabulary else ", no tokenizer", "" if difference is None else f", logits within {difference:.2g}"]
    print(f"{out}: {path} as PhimoeForCausalLM, {options.dtype}{''.join(remarks)}")
    return 0


def main_import(argv: list[str]) -> int:
    """`megagrin import-hf --source DIR --out DIR`: a checkpoint for `train.init_from`, `generate` and `export-hf`.

    `recipe.yaml` in the checkpoint holds the sections `model` and `router` for `megagrin train --config`.

    Raises:
        ValueError, OSError: see `import_model`; the target exists.
    """
    parser = CommandParser(prog="megagrin import-hf", description="Read a PhimoeForCausalLM folder into a checkpoint.")
    parser.add_argument("--source", type=str, required=True, help="folder with config.json and safetensors weights")
    parser.add_argument("--out", type=str, required=True, help="checkpoint folder to create")
    arguments = parser.parse_args(argv)
    source, out = Path(arguments.source), Path(arguments.out)
    if os.path.lexists(out):
        raise ValueError(f"--out: {out} exists already")
    require_folder("--out", out.parent)
    with about("--source"):
        model, router = import_model(source)
    run: dict[str, Any] = {"model": dataclasses.asdict(model.config), "router": dataclasses.asdict(router)}
    recipe = yaml.safe_dump(
        {"model": {key: value for key, value in run["model"].items() if key != "preset"}, "router": run["router"]},
        sort_keys=False,
    )
    eos_token_id = _read_json(source / _CONFIG).get("eos_token_id")
    tokenizer, tokens = read_tokenizer(source, eos_token_id, model.config.vocab_size)
    run["data"] = {"tokenizer": tokenizer}
    store.save_model(out, model, run, tokens)
    (out / "recipe.yaml").write_text(recipe)
    print(f"{out}: {model.config.parameter_counts()[0] / 1e6:,.1f}M parameters from {source}; model and router in recipe.yaml")
    return 0
