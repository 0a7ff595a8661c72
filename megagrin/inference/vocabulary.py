"""From text to a model's ids and back: the tokenizer of a checkpoint, and what starts and ends a text in its training data."""

from dataclasses import dataclass
from pathlib import Path

from megagrin.checkpoint.store import CheckpointInfo, TokenSource
from megagrin.checkpoint.tokens import Candidate, mismatch, recorded
from megagrin.data_prep.tokenizer import Tokenizer


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, with what a training document began and ended with.

    Attributes:
        tokenizer: of the model's training.
        start_id: stands before every text; None where documents had no bos.
        end_id: ends a text: eos, or the bos of the next document where documents end with nothing; None where neither was there.
    """

    tokenizer: Tokenizer
    start_id: int | None
    end_id: int | None

    def prompt_ids(self, text: str) -> list[int]:
        """Ids of a text to continue.

        Raises:
            ValueError: it has no id at all, or UTF-8 cannot hold it.
        """
        try:
            ids = self.tokenizer.encode(text)
        except ValueError as error:
            raise ValueError(f"--prompt: {error}") from error
        if self.start_id is not None:
            ids = [self.start_id, *ids]
        if not ids:
            raise ValueError("--prompt: must not be empty: the model's training documents had no bos to start from")
        return ids


def framed(tokenizer: Tokenizer, tokens: TokenSource) -> Vocabulary:
    """A tokenizer with the start and end that its documents were given."""
    bos_id, eos_id = (None if token < 0 else token for token in (tokenizer.bos_id, tokenizer.eos_id))
    start_id = bos_id if tokens.append_bos else None
    return Vocabulary(tokenizer, start_id, eos_id if tokens.append_eos else start_id)


def load_vocabulary(path: str | None, checkpoint: Path, info: CheckpointInfo) -> Vocabulary | None:
    """The tokenizer given by --tokenizer, else by the run's configuration (`data.tokenizer`), else None.

    Args:
        path: the option's value.
        checkpoint: whose model it is for.
        info: what that checkpoint says.

    Raises:
        ValueError: the file is missing, is no SentencePiece model, is not the tokenizer of the training, or has more pieces than
            the model has rows.
    """
    named = (info.run.get("data") or {}).get("tokenizer")
    if path is None and named is not None and not Path(named).is_file():
        raise ValueError(f"data.tokenizer of the run: {named} is not a file; name the tokenizer by --tokenizer")
    setting = "data.tokenizer of the run" if path is None else "--tokenizer"
    path = named if path is None else path
    if path is None:
        return None
    try:
        tokenizer = Tokenizer.load(path)
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from error
    if reason := mismatch(Candidate(setting, path, tokenizer.sha256), checkpoint, info):
        raise ValueError(reason)
    check_size(tokenizer, info.run["model"]["vocab_size"], setting)
    return framed(tokenizer, recorded(info))


def check_size(tokenizer: Tokenizer, vocab_size: int, setting: str) -> None:
    """Refuse a tokenizer with ids for which the model has no rows.

    Raises:
        ValueError: it has more pieces than model.vocab_size.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{setting}: {tokenizer.path}: {tokenizer.vocab_size} pieces must not exceed model.vocab_size ({vocab_size})"
        )
