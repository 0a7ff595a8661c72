"""The SentencePiece tokenizer as a `tokenizer.json` that `AutoTokenizer` loads and that gives the same ids.

The conversion differs from the usual one of Llama-like models in one point: the vocabulary holds a space as a space, not as
U+2581. The library then needs no normaliser, and a literal U+2581 in a text is spelt in bytes, as `Tokenizer.encode` does,
instead of turning into a space.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from megagrin.checkpoint.store import TokenSource
from megagrin.data_prep.tokenizer import Tokenizer
from megagrin.inference.vocabulary import Vocabulary, check_size

CONFIG = "tokenizer_config.json"
_MODEL = "tokenizer.model"
_SPACE_SYMBOL = "\u2581"
_PROBE = "\n\tdef f(x):\n        return  'tab\t¼ λ 漢字 🙂 \u2581 <s></s><0x0A>' + \"12345\"  \r\n\n\n"


def _pieces(processor: SentencePieceProcessor) -> tuple[dict[str, int], dict[str, float]]:
    """All pieces with their ids, and the scores of those that text is made of."""
    ids, scores = {}, {}
    for token in range(processor.get_piece_size()):
        piece = processor.id_to_piece(token)
        if not (processor.is_control(token) or processor.is_unknown(token) or processor.is_byte(token)):
            piece = piece.replace(_SPACE_SYMBOL, " ")
            scores[piece] = processor.get_score(token)
        ids[piece] = token
    return ids, scores


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, best first.

    SentencePiece joins any neighbours whose union is a piece, the highest score first and the leftmost among equals; the
    library wants the pairs in order. Pairs of one piece rank side by side. Their mutual order could matter only where both
    overlap in a text; tests/hf/test_hf_tokenizer.py searches for such a text and finds none.
    """
    return [
        (piece[:cut], piece[cut:])
        for piece in sorted(scores, key=scores.__getitem__, reverse=True)
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]


def convert(tokenizer: Tokenizer) -> Any:
    """Build the equal `tokenizers.Tokenizer`.

    Args:
        tokenizer: a byte-fallback BPE model of `megagrin data train-tokenizer`.

    Raises:
        ImportError: the `tokenizers` library is missing.
        ValueError: the model was made with other options, so that the two would encode differently.
    """
    try:
        from tokenizers import AddedToken, decoders, models
        from tokenizers import Tokenizer as FastTokenizer
    except ImportError as error:
        raise ImportError("exporting a tokenizer needs the tokenizers library: pip install 'megagrin[hf]'") from error
    processor = SentencePieceProcessor(model_file=tokenizer.path)
    ids, scores = _pieces(processor)
    unknown = processor.id_to_piece(tokenizer.unk_id)
    try:
        model = models.BPE(vocab=ids, merges=_merges(scores), byte_fallback=True, fuse_unk=True, unk_token=unknown)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{tokenizer.path}: cannot be converted: {error}") from error
    fast = FastTokenizer(model)
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    special = [processor.id_to_piece(token) for token in range(tokenizer.vocab_size) if processor.is_control(token)]
    fast.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in (unknown, *special)])
    fast.encode_special_tokens = True  # not stored in the file; tokenizer_config.json says it again
    _compare(tokenizer, fast, scores)
    return fast


def _compare(tokenizer: Tokenizer, fast: Any, scores: dict[str, float]) -> None:
    """Refuse a conversion that encodes the whole vocabulary, in a row and piece by piece, or a probe differently."""
    for text in (*scores, "".join(scores), "".join(reversed(scores)), _PROBE):
        if fast.encode(text, add_special_tokens=False).ids != tokenizer.encode(text):
            raise ValueError(
                f"{tokenizer.path}: {text[:20]!r} is encoded differently by the converted tokenizer; only lossless "
                "byte-fallback BPE models, as made by `megagrin data train-tokenizer`, can be exported"
            )


def _padding_id(tokenizer: Tokenizer) -> int:
    """Padding is masked out, so that any id serves: the model's own, else eos, as is usual, else unk."""
    pad_id = SentencePieceProcessor(model_file=tokenizer.path).pad_id()
    return next(token for token in (pad_id, tokenizer.eos_id, tokenizer.unk_id) if token >= 0)


def generation_config(vocabulary: Vocabulary | None, vocab_size: int) -> dict[str, Any]:
    """The content of generation_config.json: ids that start, end and pad a text, and rows of the model without a piece.

    Args:
        vocabulary: None where the export has no tokenizer.
        vocab_size: rows of the model; those beyond the tokenizer's pieces are never to be drawn.
    """
    if vocabulary is None:
        return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    tokenizer = vocabulary.tokenizer
    unused = list(range(tokenizer.vocab_size, vocab_size))
    return {
        "bos_token_id": tokenizer.bos_id if tokenizer.bos_id >= 0 else None,
        "eos_token_id": vocabulary.end_id,
        "pad_token_id": _padding_id(tokenizer),
        **({"suppress_tokens": unused} if unused else {}),
    }


def write_tokenizer(vocabulary: Vocabulary, folder: Path, max_positions: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and the SentencePiece model itself into a folder.

    Raises:
        ImportError: the `tokenizers` library is missing.
        ValueError: see `convert`.
    """
    tokenizer = vocabulary.tokenizer
    fast = convert(tokenizer)
    processor = SentencePieceProcessor(model_file=tokenizer.path)
    special = {
        "unk_token": tokenizer.unk_id,
        "bos_token": tokenizer.bos_id,
        "eos_token": tokenizer.eos_id,
        "pad_token": _padding_id(tokenizer),
    }
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
        # "</s>" in a text is four characters to the tokenizer of training, never the end of a document.
        "split_special_tokens": True,
        # Without it transformers 4 adds token_type_ids, which the model refuses.
        "model_input_names": ["input_ids", "attention_mask"],
        # New tokens follow the last one of every row.
        "padding_side": "left",
        **{name: processor.id_to_piece(token) for name, token in special.items() if token >= 0},
    }
    if vocabulary.start_id is not None:
        from tokenizers.processors import TemplateProcessing

        start = processor.id_to_piece(vocabulary.start_id)
        # transformers 4 takes the template of tokenizer.json, 5 makes it from the two fields.
        fast.post_processor = TemplateProcessing(
            single=f"{start} $A", pair=f"{start} $A {start}:1 $B:1", special_tokens=[(start, vocabulary.start_id)]
        )
        content |= {"add_bos_token": True, "add_eos_token": False}
    fast.save(str(folder / "tokenizer.json"))
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
    shutil.copyfile(tokenizer.path, folder / _MODEL)


def read_tokenizer(source: Path, eos_token_id: Any, vocab_size: int) -> tuple[str | None, TokenSource]:
    """The tokenizer of an imported folder and how it frames a text.

    Args:
        source: the folder.
        eos_token_id: of config.json: an id, several, or None.
        vocab_size: of config.json.

    Returns:
        Path of tokenizer.model, None where there is none; and what a run's checkpoint would record.

    Raises:
        ValueError: it is no SentencePiece model, or has more pieces than the model has rows.
    """
    path = source / _MODEL
    if not path.is_file():
        return None, TokenSource()
    tokenizer = Tokenizer.load(path.resolve())
    check_size(tokenizer, vocab_size, "--source")
    try:
        content = json.loads((source / CONFIG).read_text(encoding="utf-8")) if (source / CONFIG).is_file() else {}
        # Llama's class, the only one that reads such files, adds bos unless it is told not to.
        adds_bos = content.get("add_bos_token", str(content.get("tokenizer_class")).startswith("LlamaTokenizer"))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{source / CONFIG}: not valid JSON: {error}") from error
    ends = eos_token_id is not None and eos_token_id != tokenizer.bos_id
    return tokenizer.path, TokenSource(tokenizer.sha256, adds_bos is True, ends)
