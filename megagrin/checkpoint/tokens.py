"""What made the tokens that a model learned from: kept in its checkpoints, so that no other tokenizer is taken for theirs."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megagrin.checkpoint.store import CheckpointInfo, TokenSource
from megagrin.data_prep.indexed import IndexedDataset
from megagrin.data_prep.sidecar import file_sha256, read_sidecar

if TYPE_CHECKING:
    from megagrin.data_prep.tokenizer import Tokenizer

_PROBE = "  Two  words,\n\tＡ ﬁ ½ \u2581 é 12\n"


def token_source(prefix: str | None, tokenizer_path: str | None) -> TokenSource:
    """What a training run's token files and tokenizer say; without a sidecar, documents end with eos only.

    Args:
        prefix: of the training token files.
        tokenizer_path: data.tokenizer.

    Raises:
        ValueError: a damaged sidecar.
    """
    sidecar = None if prefix is None else read_sidecar(prefix)
    sha256 = None if sidecar is None else sidecar.tokenizer_sha256
    if sha256 is None and tokenizer_path is not None and Path(tokenizer_path).is_file():
        sha256 = file_sha256(tokenizer_path)
    return TokenSource(sha256) if sidecar is None else TokenSource(sha256, sidecar.append_bos, sidecar.append_eos)


def recorded(info: CheckpointInfo) -> TokenSource:
    """What a checkpoint says of its tokens; of one written before it did, what its run's files say if they are still the same."""
    if info.tokens is not None:
        return info.tokens
    data = info.run.get("data") or {}
    prefix = data.get("train")
    try:
        if prefix is not None and IndexedDataset(prefix).fingerprint() == info.data:
            return token_source(prefix, data.get("tokenizer"))
    except (ValueError, OSError):
        pass
    return token_source(None, data.get("tokenizer"))


@dataclass(frozen=True)
class Candidate:
    """A tokenizer that is about to be used with a checkpoint's model.

    Attributes:
        setting: where its name comes from, for the message.
        path: its file, or None where only its fingerprint is known.
        sha256: of the file.
    """

    setting: str
    path: str | None
    sha256: str | None


def mismatch(candidate: Candidate, checkpoint: Path, info: CheckpointInfo) -> str | None:
    """Why a tokenizer is not the one a checkpoint's model learned with, on one line; None where it is, or where nobody knows.

    A file of another name or of other bytes passes if its pieces are the same.
    """
    wanted = recorded(info).tokenizer_sha256
    if None in (candidate.sha256, wanted) or candidate.sha256 == wanted:
        return None
    named = (info.run.get("data") or {}).get("tokenizer")
    if named is not None and candidate.path is not None and Path(named).is_file() and file_sha256(named) == wanted:
        from megagrin.data_prep.tokenizer import Tokenizer  # training imports this file, and need not have sentencepiece

        if same_pieces(Tokenizer.load(candidate.path), Tokenizer.load(named)):
            return None
    origin = "" if named is None else f" ({named})"
    return (
        f"{candidate.setting}: {candidate.path or 'the tokenizer'} has SHA-256 {str(candidate.sha256)[:12]}, but {checkpoint} "
        f"was trained on tokens of a tokenizer with {str(wanted)[:12]}{origin}; its ids mean other pieces"
    )


def same_pieces(one: "Tokenizer", other: "Tokenizer") -> bool:
    """Whether two SentencePiece models give the same ids: pieces, kinds, special ids, and a text that shows normalising."""
    return _content(one) == _content(other)


def _content(tokenizer: "Tokenizer") -> list[object]:
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=tokenizer.path)
    pieces = [
        (model.id_to_piece(i), model.get_score(i), model.is_control(i), model.is_unknown(i), model.is_byte(i), model.is_unused(i))
        for i in range(tokenizer.vocab_size)
    ]
    return [pieces, tokenizer.bos_id, tokenizer.eos_id, tokenizer.encode(_PROBE)]
