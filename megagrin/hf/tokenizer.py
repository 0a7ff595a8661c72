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

from megagrin.data_prep.tokenizer import Tokenizer

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


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_positions: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and the SentencePiece model itself into a folder.

    Raises:
        ImportError: the `tokenizers` library is missing.
        ValueError: see `convert`.
    """
    convert(tokenizer).save(str(folder / "tokenizer.json"))
    processor = SentencePieceProcessor(model_file=tokenizer.path)
    special = {"unk_token": tokenizer.unk_id, "bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
        # "</s>" in a text is four characters to the tokenizer of training, never the end of a document.
        "split_special_tokens": True,
        **{name: processor.id_to_piece(token) for name, token in special.items() if token >= 0},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(content, indent=2) + "\n")
    shutil.copyfile(tokenizer.path, folder / "tokenizer.model")
