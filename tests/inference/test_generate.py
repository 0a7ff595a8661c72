"""Generation: the cache changes nothing, draws follow (seed, position) and the nucleus, bad requests are refused."""

import hashlib
import json
import math
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrin import rng
from megagrin.checkpoint import store
from megagrin.cli import run_command
from megagrin.data_prep.tokenizer import Tokenizer
from megagrin.hf.folder import ExportOptions, export_model
from megagrin.inference.generate import Sampling, choose, generate, nucleus, request_violations, text_parts, uniform
from megagrin.models.init import init_parameters
from megagrin.models.transformer import ModelConfig, Transformer
from megagrin.moe.router import RouterConfig
from megagrin.nn.attention import KVCache

_CONFIG = ModelConfig(
    vocab_size=97,
    n_layers=3,
    d_model=48,
    n_heads=6,
    n_kv_heads=3,
    head_dim=8,
    d_ff=32,
    n_experts=5,
    max_positions=64,
    window=7,
    init_std=0.15,
)
_ROUTER = RouterConfig(mask_eps=0.2)
_PROMPT = [5, 17, 3, 44]
_GREEDY = Sampling(temperature=0, max_new_tokens=1000)


def _model(config: ModelConfig = _CONFIG) -> Transformer:
    model = Transformer(config, _ROUTER)
    init_parameters(model, config, seed=2)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> Transformer:
    return _model()


@torch.inference_mode()
@pytest.mark.parametrize("window", [1, 7, 64])
@pytest.mark.parametrize("cuts", [[1] * 40, [12] + [1] * 28, [20, 20], [3, 9, 1, 27]])
def test_cached_logits_equal_uncached(window: int, cuts: list[int]) -> None:
    model = _model(replace(_CONFIG, window=window))
    tokens_BS = torch.randint(97, (2, 40))
    cache = KVCache(_CONFIG.n_layers)
    parts = [model(part_BS, cache=cache).logits_BSV for part_BS in tokens_BS.split(cuts, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens_BS).logits_BSV, atol=1e-5, rtol=0)


def test_greedy_is_the_argmax_of_the_whole_sequence(model: Transformer) -> None:
    tokens = _PROMPT + list(generate(model, _PROMPT, _GREEDY))
    assert len(tokens) == _CONFIG.max_positions
    with torch.inference_mode():
        expected_S = model(torch.tensor([tokens])).logits_BSV[0].argmax(-1)
    assert tokens[len(_PROMPT) :] == expected_S[len(_PROMPT) - 1 : -1].tolist()
    assert len(set(tokens)) > 5


@pytest.mark.parametrize("window", [7, 64])
def test_greedy_equals_transformers(window: int, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = _model(replace(_CONFIG, window=window))
    export_model(model, _ROUTER, None, tmp_path / "out", ExportOptions())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager").eval()
    expected = theirs.generate(torch.tensor([_PROMPT]), max_new_tokens=50, do_sample=False, pad_token_id=0)
    assert _PROMPT + list(generate(model, _PROMPT, replace(_GREEDY, max_new_tokens=50))) == expected[0].tolist()


class TestDraws:
    def test_seed_decides(self, model: Transformer) -> None:
        sampling = Sampling(max_new_tokens=30, temperature=1.0, top_p=1.0, seed=1)
        first = list(generate(model, _PROMPT, sampling))
        assert first == list(generate(model, _PROMPT, sampling))
        assert first != list(generate(model, _PROMPT, replace(sampling, seed=2)))

    def test_position_decides_not_the_call(self, model: Transformer) -> None:
        sampling = Sampling(max_new_tokens=30, temperature=1.0, top_p=1.0)
        whole = list(generate(model, _PROMPT, sampling))
        head = list(generate(model, _PROMPT, replace(sampling, max_new_tokens=11)))
        assert head + list(generate(model, _PROMPT + head, replace(sampling, max_new_tokens=19))) == whole

    def test_uniform_numbers(self) -> None:
        numbers = torch.tensor([uniform(seed, position) for seed in (0, 1, 2**64 - 1) for position in (*range(300), 2**32)])
        assert len(numbers.unique()) == 903
        assert numbers.min() >= 0
        assert numbers.max() < 1
        assert abs(numbers.mean() - 0.5) < 4 * math.sqrt(1 / 12 / 903)

    @pytest.mark.parametrize("position", [0, 7, 2**32 + 7])
    def test_a_number_is_53_bits_of_its_own_block(self, position: int) -> None:
        """Philox (its vectors: tests/test_rng.py) of the position alone, under a key from the seed and this command's name."""
        digest = hashlib.sha256(b"5/generate").digest()
        key = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")
        low, high = position % 2**32, position // 2**32
        words = rng.philox((torch.tensor(low), torch.tensor(high), torch.tensor(0), torch.tensor(0)), key)
        assert uniform(5, position) == (int(words[0]) * 2**21 + int(words[1]) // 2**11) / 2**53

    def test_largest_number_draws_the_last_token(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("megagrin.inference.generate.uniform", lambda seed, position: 1 - 2.0**-53)
        for scale in torch.linspace(0.1, 30.0, 200):
            assert choose(torch.randn(50) * scale, Sampling(temperature=1.0, top_p=0.9), 0) < 50

    def test_frequencies_are_the_probabilities(self) -> None:
        p = torch.tensor([0.1, 0.5, 0.0, 0.4])
        n = 2000
        counts = Counter(choose(p.log().clamp_min(-1e4), Sampling(temperature=1.0, top_p=1.0), position) for position in range(n))
        for token, probability in enumerate(p.tolist()):
            assert abs(counts[token] - n * probability) <= 4 * math.sqrt(n * probability * (1 - probability))

    def test_only_the_nucleus_is_drawn(self) -> None:
        logits_V = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
        drawn = {choose(logits_V, Sampling(temperature=1.0, top_p=0.7), position) for position in range(300)}
        assert drawn == {1, 3}


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=30),
    st.floats(0.1, 10),
    st.floats(0.001, 1) | st.just(1.0),
)
def test_nucleus_is_the_smallest_set(logits: list[float], temperature: float, top_p: float) -> None:
    p_V, token_V = nucleus(torch.tensor(logits), temperature, top_p)
    weights = [math.exp((logit - max(logits)) / temperature) for logit in logits]
    expected = [weight / math.fsum(weights) for weight in weights]
    assert torch.allclose(p_V, torch.tensor(expected, dtype=torch.float64)[token_V], rtol=1e-9, atol=0)
    kept = token_V.tolist()
    assert len(set(kept)) == len(kept)
    outside = [expected[token] for token in range(len(logits)) if token not in kept]
    assert min(expected[token] for token in kept) >= max(outside, default=0.0) * (1 - 1e-12)
    assert len(kept) == len(logits) if top_p == 1 else p_V.sum() >= top_p * (1 - 1e-12)
    assert top_p == 1 or p_V[:-1].sum() < top_p * (1 + 1e-12), "one fewer would do"


def test_nucleus_exact_sets() -> None:
    logits_V = torch.tensor([0.25, 0.5, 0.125, 0.125]).log()
    for top_p, expected in [(1e-9, [1]), (0.5, [1]), (0.51, [1, 0]), (0.75, [1, 0]), (0.8, [1, 0, 2]), (1.0, [1, 0, 2, 3])]:
        assert nucleus(logits_V, 1.0, top_p)[1].tolist() == expected
    assert nucleus(torch.tensor([1.0, 2.0, 2.0]), 1e-308, 1.0)[0].tolist() == [0.5, 0.5, 0.0]
    assert nucleus(torch.tensor([0.0, 60.0]), 1.0, 1.0)[1].tolist() == [1, 0], "1 keeps what rounding would lose"


class TestEnd:
    def test_eos_is_the_last_token(self, model: Transformer) -> None:
        free = list(generate(model, _PROMPT, _GREEDY))
        eos = free[9]
        assert list(generate(model, _PROMPT, _GREEDY, eos_id=eos)) == free[: free.index(eos) + 1]

    def test_max_new_tokens(self, model: Transformer) -> None:
        assert len(list(generate(model, _PROMPT, replace(_GREEDY, max_new_tokens=3)))) == 3

    def test_last_position(self, model: Transformer) -> None:
        assert len(list(generate(model, [1] * 63, _GREEDY))) == 1

    def test_ids_beyond_the_tokenizer_are_never_chosen(self, model: Transformer) -> None:
        assert max(generate(model, _PROMPT, Sampling(60, 5.0, 1.0))) >= 20
        assert max(generate(model, _PROMPT, Sampling(60, 5.0, 1.0), vocab_size=20)) < 20


@pytest.mark.parametrize(
    ("tokens", "change", "message"),
    [
        ([], {}, "--prompt: must hold at least one token"),
        ([1] * 64, {}, r"--prompt: 64 tokens must be fewer than model\.max_positions \(64\)"),
        ([1, 97], {}, r"--prompt: token id 97 must lie in \[0, 97\)"),
        ([-1], {}, "--prompt: token id -1"),
        ([1], {"temperature": -0.1}, "--temperature: -0.1 must not be negative"),
        ([1], {"temperature": math.inf}, "--temperature: inf"),
        ([1], {"temperature": math.nan}, "--temperature: nan"),
        ([1], {"top_p": 0.0}, r"--top_p: 0.0 must lie in \(0, 1\]"),
        ([1], {"top_p": 1.1}, "--top_p: 1.1"),
        ([1], {"max_new_tokens": 0}, "--max_new_tokens: 0"),
        ([1], {"seed": -1}, "--seed: -1"),
        ([1], {"seed": 2**64}, "--seed"),
    ],
)
def test_bad_requests(model: Transformer, tokens: list[int], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(generate(model, tokens, replace(Sampling(), **change)))


def test_every_id_of_the_model_is_a_prompt(model: Transformer) -> None:
    vocab_size = model.config.vocab_size
    assert request_violations(model.config, [0, vocab_size - 1], Sampling()) == []
    for token in (-1, vocab_size):
        assert request_violations(model.config, [0, token], Sampling()) == [
            f"--prompt: token id {token} must lie in [0, {vocab_size})"
        ]


def test_broken_weights_are_named() -> None:
    model = _model()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(FloatingPointError, match="position 4"):
        next(generate(model, _PROMPT, _GREEDY))


class TestText:
    @pytest.mark.parametrize("text", ["x = 'ü 漢字 🙂'\n", "a\ufffd", "  ", "🙂\ufffd🙂"])
    def test_parts_make_the_text(self, small_tokenizer: Tokenizer, text: str) -> None:
        prompt = small_tokenizer.encode("pr ")
        parts = list(text_parts(small_tokenizer, prompt, iter(small_tokenizer.encode(text))))
        assert "".join(parts) == text

    def test_characters_are_shown_whole(self, small_tokenizer: Tokenizer) -> None:
        ids = small_tokenizer.encode("🙂a")
        assert len(ids) == 5
        assert [part for part in text_parts(small_tokenizer, [5], iter(ids)) if part] == ["🙂", "a"]

    def test_unfinished_bytes_come_at_the_end(self, small_tokenizer: Tokenizer) -> None:
        ids = small_tokenizer.encode("🙂")[:2]
        assert "".join(text_parts(small_tokenizer, [5], iter(ids))) == small_tokenizer.decode(ids) != ""


class TestCommand:
    @pytest.fixture
    def saved(self, small_tokenizer: Tokenizer, tmp_path: Path) -> Path:
        model = _model(replace(_CONFIG, vocab_size=small_tokenizer.vocab_size + 3))
        run = {"model": asdict(model.config), "router": asdict(_ROUTER), "data": {"tokenizer": small_tokenizer.path}}
        store.save_model(tmp_path / "run/checkpoints/step_00000002", model, run)
        return tmp_path / "run"

    def test_prints_prompt_and_continuation(
        self, saved: Path, small_tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = ["--checkpoint", str(saved), "--prompt", "def f(x):\n", "--max_new_tokens=20", "--temperature=1", "--seed=3"]
        assert run_command("generate", arguments) == 0
        printed = capsys.readouterr().out
        model, _ = store.load_model(saved)
        prompt = small_tokenizer.encode("def f(x):\n")
        new = list(generate(model, prompt, Sampling(20, 1.0, seed=3), small_tokenizer.eos_id, small_tokenizer.vocab_size))
        assert printed == small_tokenizer.decode(prompt + new) + "\n"
        assert run_command("generate", [*arguments, "--stream"]) == 0
        assert capsys.readouterr().out == printed

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"checkpoint": "{saved}/nothing"}, "neither a checkpoint"),
            ({"prompt": ""}, "--prompt: must not be empty"),
            ({"prompt": "0" * 70}, "--prompt: 70 tokens must be fewer than model.max_positions (64)"),
            ({"temperature": "-1"}, "--temperature: -1.0"),
            ({"top_p": "0"}, "--top_p: 0.0"),
            ({"tokenizer": "no.model"}, "no.model"),
        ],
    )
    def test_errors_are_one_line(
        self, change: dict[str, str], message: str, saved: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        options = {"checkpoint": str(saved), "prompt": "x"} | {key: value.format(saved=saved) for key, value in change.items()}
        assert run_command("generate", [f"--{key}={value}" for key, value in options.items()]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert message in captured.err
        assert captured.err.count("\n") == 1

    def test_tokenizer_of_another_model(self, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = saved / "checkpoints/step_00000002/checkpoint.json"
        content = json.loads(path.read_text())
        tokenizer = content["run"]["data"].pop("tokenizer")
        path.write_text(json.dumps(content))
        assert run_command("generate", ["--checkpoint", str(saved), "--prompt=x"]) == 2
        assert "names no data.tokenizer" in capsys.readouterr().err
        assert run_command("generate", ["--checkpoint", str(saved), "--prompt=x", "--tokenizer", tokenizer]) == 0

    def test_starts_without_transformers(self, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in ("transformers", "tokenizers"):
            monkeypatch.setitem(sys.modules, module, None)
        assert run_command("generate", ["--checkpoint", str(saved), "--prompt=x", "--max_new_tokens=1"]) == 0
        assert run_command("export-hf", ["--checkpoint", str(saved), "--out", str(saved / "x")]) == 2
