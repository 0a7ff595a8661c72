"""What can be known of a run's token files before a rank starts: a few reads of each file, whatever its size."""

from itertools import combinations
from pathlib import Path

from megagrin.data.loader import DataConfig
from megagrin.data.packing import label_violations
from megagrin.data_prep.indexed import IndexedDataset
from megagrin.data_prep.layout import Outline, id_range, read_outline
from megagrin.data_prep.sidecar import file_sha256, sidecar_path

# Without a sidecar only the tokens tell whether they fit the vocabulary. A start reads them all; this many take a second.
_SCANNED_TOKENS = 1 << 26


def file_violations(config: DataConfig, *, vocab_size: int, seq_len: int, eval_samples: int) -> list[str]:
    """Every reason why a run cannot be trained and evaluated on its token files, as `setting: value and rule`.

    Args:
        config: names the files.
        vocab_size: of the model.
        seq_len: train.seq_len.
        eval_samples: train.eval_samples; counts only where there are validation files.
    """
    broken: list[str] = []
    outlines: dict[str, Outline] = {}
    for setting, prefix in (("data.train", config.train), ("data.valid", config.valid)):
        if prefix is None:
            continue
        try:
            outlines[setting] = read_outline(prefix)
            broken += _pair_violations(setting, outlines[setting], config, vocab_size, seq_len)
        except (ValueError, OSError) as error:
            broken.append(f"{setting}: {_reason(error)}")
    broken += _tokenizer_violations(config, outlines)
    valid = outlines.get("data.valid")
    if valid is not None and valid.tokens > seq_len > 0:
        broken += _evaluation_violations(valid, config, seq_len, eval_samples)
    return broken


def _reason(error: ValueError | OSError) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _pair_violations(setting: str, pair: Outline, config: DataConfig, vocab_size: int, seq_len: int) -> list[str]:
    if not pair.tokens:
        return [f"{setting}: {pair.prefix}: no token in {pair.documents} documents"]
    broken = []
    if pair.tokens <= seq_len:
        broken.append(
            f"{setting}: {pair.prefix}: {pair.tokens} tokens are too few for one sample of "
            f"train.seq_len + 1 = {seq_len + 1} tokens"
        )
    if pair.sidecar is None:
        smallest, largest = id_range(pair.first_tokens(_SCANNED_TOKENS))
        if smallest < 0 or largest >= vocab_size:
            bad = smallest if smallest < 0 else largest
            broken.append(
                f"{setting}: {pair.prefix}.bin: token id {bad} lies outside the model's vocabulary, model.vocab_size={vocab_size}"
            )
    elif pair.sidecar.vocab_size > vocab_size:
        broken.append(
            f"{setting}: {pair.prefix}: its tokenizer has vocab_size={pair.sidecar.vocab_size}, "
            f"the model only model.vocab_size={vocab_size}"
        )
    # More tokens than documents: one of them has two. Only where that does not tell are the lengths read. Of data.valid those
    # samples count that are evaluated.
    if config.document_attention and setting == "data.train" and pair.tokens <= pair.documents:
        broken += label_violations(setting, IndexedDataset(pair.prefix), pair.tokens)
    return broken


def _tokenizer_violations(config: DataConfig, outlines: dict[str, Outline]) -> list[str]:
    recorded = {
        setting: pair.sidecar.tokenizer_sha256
        for setting, pair in outlines.items()
        if pair.sidecar is not None and pair.sidecar.tokenizer_sha256 is not None
    }
    broken = [
        f"{two}: {outlines[two].prefix} was made with another tokenizer (SHA-256 {recorded[two][:12]}) than "
        f"{one}={outlines[one].prefix} ({recorded[one][:12]})"
        for one, two in combinations(recorded, 2)
        if recorded[one] != recorded[two]
    ]
    if config.tokenizer is None:
        return broken
    try:
        if not Path(config.tokenizer).is_file():
            return [*broken, f"data.tokenizer: {config.tokenizer}: no such tokenizer file"]
        actual = file_sha256(config.tokenizer)
    except OSError as error:
        return [*broken, f"data.tokenizer: {config.tokenizer}: {error.strerror}"]
    return broken + [
        f"data.tokenizer: {config.tokenizer} has SHA-256 {actual[:12]}, but {sidecar_path(outlines[setting].prefix)} of "
        f"{setting} records {wanted[:12]}: the tokens were made with another tokenizer"
        for setting, wanted in recorded.items()
        if actual != wanted
    ]


def _evaluation_violations(pair: Outline, config: DataConfig, seq_len: int, eval_samples: int) -> list[str]:
    samples = (pair.tokens - 1) // seq_len
    if eval_samples > samples:
        return [
            f"train.eval_samples: {eval_samples} exceeds the {samples} samples of train.seq_len={seq_len} tokens in "
            f"data.valid={pair.prefix}"
        ]
    if not config.document_attention:
        return []
    return label_violations("data.valid", IndexedDataset(pair.prefix), eval_samples * seq_len + 1)
