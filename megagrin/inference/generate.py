"""`megagrin generate`: continue a prompt, one token at a time, with a key-value cache.

A token depends on the model, the tokens before it and a random number addressed by (seed, position), so a continuation is the
same with and without streaming, and whether it is made in one call or in several.

Shape suffixes: B = 1 sequence, S positions, V vocabulary.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megagrin import rng
from megagrin.checkpoint import store
from megagrin.data_prep.tokenizer import Tokenizer
from megagrin.inference.vocabulary import load_vocabulary
from megagrin.models.transformer import ModelConfig, Transformer
from megagrin.nn.attention import KVCache
from megagrin.settings import config
from megagrin.settings.arguments import about
from megagrin.settings.commands import CommandParser

_MASK_32 = 0xFFFFFFFF


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Attributes:
        max_new_tokens: longest continuation.
        temperature: divides the logits; 0 takes the largest one.
        top_p: draw from the fewest most likely tokens whose probabilities sum to this, (0, 1].
        seed: of the draws.
    """

    max_new_tokens: int = 128
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0

    def violations(self) -> list[str]:
        """Every broken rule, as `option: value and rule`."""
        broken = []
        if self.max_new_tokens < 1:
            broken.append(f"--max_new_tokens: {self.max_new_tokens} must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            broken.append(f"--temperature: {self.temperature} must not be negative nor infinite")
        if not 0 < self.top_p <= 1:
            broken.append(f"--top_p: {self.top_p} must lie in (0, 1]")
        if not 0 <= self.seed < 1 << 64:
            broken.append(f"--seed: {self.seed} must lie in [0, 2^64)")
        return broken


def nucleus(logits_V: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """The fewest most likely tokens whose probabilities sum to top_p at least (arXiv 1904.09751, section 3.1).

    Args:
        logits_V: any float dtype.
        temperature: positive.
        top_p: (0, 1].

    Returns:
        fp64 probabilities, largest first, not renormalised; and their int64 tokens. Equal ones are in the order of their ids.
    """
    # From the largest logit down: a tiny temperature then gives −∞, never ∞ − ∞.
    scaled_V = (logits_V.double() - logits_V.max()) / temperature
    p_V, token_V = torch.softmax(scaled_V, dim=-1).sort(descending=True, stable=True)
    # 1 keeps everything, also where rounding lets the sum reach 1 early.
    kept = p_V.numel() if top_p == 1 else 1 + int((p_V.cumsum(0)[:-1] < top_p).sum())
    return p_V[:kept], token_V[:kept]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits for a position of the sequence."""
    counter = [torch.tensor(word) for word in (position & _MASK_32, position >> 32, 0, 0)]
    high, low, _, _ = rng.philox((counter[0], counter[1], counter[2], counter[3]), rng.stream_key(seed, "generate"))
    return ((int(high) << 21) | (int(low) >> 11)) * 2.0**-53


def choose(logits_V: Tensor, sampling: Sampling, position: int) -> int:
    """The token for a position, given the logits before it; a temperature of 0 takes the largest.

    Raises:
        FloatingPointError: a logit is not finite.
    """
    if not torch.isfinite(logits_V).all():
        raise FloatingPointError(f"position {position}: the model's logits are not finite")
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    p_V, token_V = nucleus(logits_V, sampling.temperature, sampling.top_p)
    cumulative_V = p_V.cumsum(0)
    # The number is at most 1 − 2^-53, so that its product with the total always rounds to less than the total.
    place = int((cumulative_V <= uniform(sampling.seed, position) * cumulative_V[-1]).sum())
    return int(token_V[place])


def request_violations(model: ModelConfig, tokens: Sequence[int], sampling: Sampling) -> list[str]:
    """Every reason why a model cannot continue these tokens, as `option: value and rule`."""
    broken = sampling.violations()
    if not tokens:
        broken.append("--prompt: must hold at least one token")
    elif len(tokens) >= model.max_positions:
        broken.append(f"--prompt: {len(tokens)} tokens must be fewer than model.max_positions ({model.max_positions})")
    if outside := [token for token in tokens if not 0 <= token < model.vocab_size]:
        broken.append(f"--prompt: token id {outside[0]} must lie in [0, {model.vocab_size})")
    return broken


def generate(
    model: Transformer, tokens: Sequence[int], sampling: Sampling, eos_id: int | None = None, vocab_size: int | None = None
) -> Iterator[int]:
    """Continue a sequence.

    Args:
        model: on one device, in eval mode.
        tokens: the prompt, at least one token.
        sampling: how to choose, and how many at most.
        eos_id: a token that ends the continuation (and is its last one); None never ends it.
        vocab_size: only ids below it are chosen, for a tokenizer with fewer pieces than the model has rows; None takes all.

    Yields:
        New tokens, until eos_id, sampling.max_new_tokens or model.config.max_positions ends them.

    Raises:
        ValueError: at the first step; a bad option, an empty prompt, a prompt that leaves no position free, or an id outside the
            vocabulary.
    """
    config.check(request_violations(model.config, tokens, sampling))
    limit = model.config.max_positions
    device = model.embed.weight.device
    cache = KVCache(model.config.n_layers)
    step_BS = torch.tensor([list(tokens)], device=device)
    for position in range(len(tokens), min(len(tokens) + sampling.max_new_tokens, limit)):
        with torch.inference_mode():
            logits_BSV = model(step_BS, cache=cache, last_only=True).logits_BSV
        assert logits_BSV is not None
        token = choose(logits_BSV[0, -1, :vocab_size], sampling, position)
        yield token
        if token == eos_id:
            return
        step_BS = torch.tensor([[token]], device=device)


def text_parts(tokenizer: Tokenizer, prompt: Sequence[int], new: Iterator[int]) -> Iterator[str]:
    """Text of new tokens as it becomes certain: bytes of an unfinished character wait for the rest of it.

    Decoding starts at the prompt, since a tokenizer from elsewhere may treat a text's first piece in its own way.
    """
    ids = list(prompt)
    shown = len(tokenizer.decode(ids))
    for token in new:
        ids.append(token)
        text = tokenizer.decode(ids)
        certain = len(text.rstrip("\ufffd"))
        if certain > shown:
            yield text[shown:certain]
            shown = certain
    yield tokenizer.decode(ids)[shown:]


def main(argv: list[str]) -> int:
    """`megagrin generate --checkpoint RUN_OR_CHECKPOINT --prompt TEXT`: print the prompt and its continuation.

    Raises:
        ValueError: see `generate`; no checkpoint or no tokenizer.
    """
    parser = CommandParser(prog="megagrin generate", description="Continue a prompt with a trained model.")
    parser.add_argument("--checkpoint", type=str, required=True, help="checkpoint folder, or run folder (its newest checkpoint)")
    parser.add_argument("--prompt", type=str, required=True, help="text to continue")
    parser.add_argument("--tokenizer", type=str | None, default=None, help="SentencePiece model (default: data.tokenizer)")
    parser.add_class_arguments(Sampling)
    parser.add_argument("--stream", type=bool, nargs="?", const=True, default=False, help="print text as it comes")
    parser.add_argument("--device", type=Literal["cpu", "cuda"], default="cpu", help="where to compute")
    arguments = parser.parse_args(argv)
    sampling = Sampling(arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.seed)
    config.check(sampling.violations())
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: cuda is not available here; use --device=cpu")
    with about("--checkpoint"):
        path = store.find(Path(arguments.checkpoint))
        info = store.read_info(path)
    vocabulary = load_vocabulary(arguments.tokenizer, path, info)
    if vocabulary is None:
        raise ValueError(f"--checkpoint: {path}: its run names no data.tokenizer; name the tokenizer by --tokenizer")
    prompt = vocabulary.prompt_ids(arguments.prompt)
    config.check(request_violations(ModelConfig(**info.run["model"]), prompt, sampling))  # before weights are read
    with about("--checkpoint"):
        model, _ = store.load_model(path)
    tokenizer = vocabulary.tokenizer
    new: list[int] = []
    tokens = generate(model.to(arguments.device), prompt, sampling, vocabulary.end_id, tokenizer.vocab_size)
    parts = text_parts(tokenizer, prompt, _kept(tokens, new))
    if not arguments.stream:
        parts = iter(["".join(parts)])
    sys.stdout.write(arguments.prompt)
    for part in parts:
        sys.stdout.write(part)
        sys.stdout.flush()
    print(flush=True)
    if len(new) < sampling.max_new_tokens and new[-1] != vocabulary.end_id:
        print(
            f"megagrin: generation ended after {len(new)} of {sampling.max_new_tokens} tokens (--max_new_tokens): the prompt's "
            f"{len(prompt)} and these fill model.max_positions ({model.config.max_positions})",
            file=sys.stderr,
        )
    return 0


def _kept(tokens: Iterator[int], into: list[int]) -> Iterator[int]:
    """Pass tokens on as they come, and keep them."""
    for token in tokens:
        into.append(token)
        yield token
