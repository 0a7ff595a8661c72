"""Batches: one order for every layout, each sample once per epoch, resume anywhere, document borders, refusals."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrin.data.loader import Batch, DataConfig, GlobalBatches, check_token_file, evaluation_batches
from megagrin.data.packing import PackedDataset
from megagrin.data_prep.indexed import IndexedDataset, IndexedDatasetWriter
from megagrin.data_prep.sidecar import Provenance

VOCAB = 4000
LENGTHS = [5, 0, 1, 40, 3, 12, 0, 7, 1, 1, 30, 9]  # 109 tokens: 13 samples of 8 + 1 tokens, 4 left over
S = 8


def write(prefix: Path, lengths: list[int]) -> str:
    """Every token is unique: token = its place in the file."""
    with IndexedDatasetWriter(prefix, Provenance(VOCAB)) as writer:
        writer.add(np.arange(sum(lengths)), lengths)
    return str(prefix)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("loader") / "numbers", LENGTHS)


def batches(prefix: str, **options: object) -> GlobalBatches:
    layout = {"seq_len": S, "global_batch_size": 4, "micro_batch_size": 1, "dp_rank": 0, "dp_size": 1, "seed": 5}
    names = ("document_attention", "shuffle", "num_workers", "tokenizer")
    config = DataConfig(**{name: options.pop(name) for name in names if name in options})  # type: ignore[arg-type]
    return GlobalBatches(config, prefix, **(layout | {"vocab_size": VOCAB} | options))  # type: ignore[arg-type]


def joined(parts: list[Batch]) -> dict[str, torch.Tensor]:
    names = [name for name, value in vars(parts[0]).items() if value is not None]
    return {name: torch.cat([getattr(part, name) for part in parts]) for name in names}


def global_batch(prefix: str, step: int, dp: int = 1, **options: object) -> dict[str, torch.Tensor]:
    parts: list[Batch] = []
    for rank in range(dp):
        reader = batches(prefix, dp_rank=rank, dp_size=dp, **options)
        parts += reader.micro_batches(step)
        reader.close()
    return joined(parts)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_shapes_and_contents(prefix: str) -> None:
    parts = batches(prefix, micro_batch_size=2).micro_batches(0)
    assert len(parts) == 2
    for number, batch in enumerate(parts):
        assert batch.documents_BS is None
        assert {(t.dtype, t.shape) for t in vars(batch.to("cpu")).values() if t is not None} == {(torch.int64, (2, S))}
        assert batch.positions_BS.tolist() == [list(range(S))] * 2
        assert batch.token_index_BS.flatten().tolist() == list(range(number * 2 * S, (number + 1) * 2 * S))
        assert torch.equal(batch.labels_BS[:, :-1], batch.tokens_BS[:, 1:])


@pytest.mark.parametrize("document_attention", [False, True])
def test_any_layout_and_worker_count_gives_the_same_global_batches(prefix: str, document_attention: bool) -> None:
    for step in (0, 2, 3, 11):  # an epoch has 13 samples: step 3 holds the end of one and the start of the next
        whole = global_batch(prefix, step, micro_batch_size=4, document_attention=document_attention)
        for dp, micro in ((1, 1), (2, 1), (2, 2), (4, 1)):
            part = global_batch(prefix, step, dp, micro_batch_size=micro, document_attention=document_attention)
            assert same(part, whole)
    with_workers = global_batch(prefix, 3, num_workers=2, micro_batch_size=2, document_attention=document_attention)
    assert same(with_workers, global_batch(prefix, 3, document_attention=document_attention))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_at_any_step_equals_the_uninterrupted_run(prefix: str, num_workers: int) -> None:
    reader = batches(prefix, micro_batch_size=2)
    straight = [joined(reader.micro_batches(step)) for step in range(12)]
    for start in range(0, 12, 1 if num_workers == 0 else 5):
        resumed = batches(prefix, micro_batch_size=2, num_workers=num_workers)
        for step in range(start, 12):
            assert same(joined(resumed.micro_batches(step)), straight[step])
        resumed.close()
    assert same(joined(reader.micro_batches(4)), straight[4])  # and back, with the same reader


def test_every_sample_once_per_epoch_in_another_order(prefix: str) -> None:
    packed = PackedDataset(IndexedDataset(prefix), seq_len=S, seed=5, shuffle=True)
    assert packed.samples_per_epoch == 13
    orders = []
    for epoch in range(4):
        labels = [packed[epoch * 13 + number].tokens[1:].tolist() for number in range(13)]
        flat = [token for sample in labels for token in sample]
        assert len(set(flat)) == 13 * S  # no token is predicted twice in an epoch
        orders.append(labels)
    assert orders[0] != orders[1] != orders[2] != orders[3]


def test_seed_fixes_the_order_for_good(prefix: str) -> None:
    """The numbers are part of the promise that an old run can be resumed with newer libraries."""

    def first_tokens(seed: int) -> list[int]:
        packed = PackedDataset(IndexedDataset(prefix), seq_len=S, seed=seed, shuffle=True)
        return [int(packed[number].tokens[0]) for number in range(6)]

    assert first_tokens(5) == [98, 22, 54, 30, 74, 6]
    assert first_tokens(6) != first_tokens(5)


@settings(max_examples=60)
@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=20), seq_len=st.integers(1, 40), epoch=st.integers(0, 3))
def test_packing_equals_its_definition(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seq_len: int, epoch: int
) -> None:
    dataset = IndexedDataset(write(tmp_path_factory.mktemp("packing") / "a", lengths))
    if sum(lengths) <= seq_len:
        with pytest.raises(ValueError, match=rf"{sum(lengths)} tokens are too few .* seq_len \+ 1 = {seq_len + 1}"):
            PackedDataset(dataset, seq_len=seq_len, seed=1, shuffle=True)
        return
    packed = PackedDataset(dataset, seq_len=seq_len, seed=1, shuffle=True)
    count = packed.samples_per_epoch
    samples = [packed[epoch * count + number] for number in range(count)]
    index = packed._epoch
    assert index is not None
    assert sorted(index.documents_D.tolist()) == [d for d, length in enumerate(lengths) if length]
    stream = np.concatenate([dataset[d] for d in index.documents_D])
    owner = np.repeat(np.arange(index.documents_D.size), [lengths[d] for d in index.documents_D])
    assert sorted(index.samples_N.tolist()) == list(range((stream.size - 1) // seq_len))
    for position, sample in zip(index.samples_N.tolist(), samples, strict=True):
        cut = slice(position * seq_len, (position + 1) * seq_len + 1)
        assert sample.tokens.tolist() == stream[cut].tolist()
        assert sample.documents.tolist() == (owner[cut] - owner[cut][0]).tolist()


def test_without_shuffle_the_order_is_that_of_the_file(prefix: str) -> None:
    whole = global_batch(prefix, 0, shuffle=False, global_batch_size=13, micro_batch_size=13)
    assert whole["tokens_BS"].flatten().tolist() == list(range(13 * S))


def test_documents_positions_and_labels(prefix: str) -> None:
    """Tokens number their places in the file, so document borders can be looked up there."""
    document_of = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    for step in range(7):
        batch = batches(prefix, document_attention=True, micro_batch_size=4).micro_batches(step)[0]
        assert batch.documents_BS is not None
        for tokens, labels, positions, documents in zip(
            *(t.tolist() for t in (batch.tokens_BS, batch.labels_BS, batch.positions_BS, batch.documents_BS)), strict=True
        ):
            position = document = 0
            for i, token in enumerate(tokens):
                if i and document_of[token] != document_of[tokens[i - 1]]:
                    position, document = 0, document + 1
                assert (positions[i], documents[i]) == (position, document)
                position += 1
                # Inside a document the next token is the next place of the file; elsewhere there is nothing to predict.
                is_last = token + 1 == document_of.size or document_of[token + 1] != document_of[token]
                assert labels[i] == (-100 if is_last else token + 1)


def test_evaluation_batches_do_not_depend_on_the_layout(prefix: str) -> None:
    layout = {"seq_len": S, "vocab_size": VOCAB}
    config = DataConfig(document_attention=True)
    for samples, dp, micro in ((10, 1, 1), (10, 2, 2), (10, 4, 4), (99, 3, 2), (1, 4, 2)):
        ranks = [
            evaluation_batches(config, prefix, samples=samples, micro_batch_size=micro, dp_rank=rank, dp_size=dp, **layout)
            for rank in range(dp)
        ]
        assert len({len(rank) for rank in ranks}) == 1
        assert {batch.tokens_BS.shape for rank in ranks for batch in rank} == {(micro, S)}
        count = min(samples, 13)
        whole = joined([batch for rank in ranks for batch in rank])
        assert whole["tokens_BS"][:count].flatten().tolist() == list(range(count * S))
        assert (whole["labels_BS"][:count] != -100).any(dim=1).all()
        assert (whole["labels_BS"][count:] == -100).all()


def test_the_global_random_state_is_left_alone(prefix: str) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    for workers in (0, 1):
        torch.manual_seed(3)
        reader = batches(prefix, num_workers=workers)
        reader.micro_batches(0)
        reader.close()
        assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("options", "message"), [
    ({"global_batch_size": 6, "micro_batch_size": 2, "dp_size": 2}, "6 must be .* dp_size × micro_batch_size = 2 × 2"),
    ({"global_batch_size": 0}, "global_batch_size: 0 must be a positive multiple"),
    ({"micro_batch_size": 0}, "dp_size × micro_batch_size = 1 × 0"),
    ({"dp_rank": 1}, r"dp_rank: 1 must lie in \[0, dp_size=1\)"),
    ({"seq_len": 109}, r"numbers: 109 tokens are too few for one sample of seq_len \+ 1 = 110 tokens"),
    ({"seq_len": 0}, "seq_len: 0 must be positive"),
    ({"vocab_size": VOCAB - 1}, r"numbers: its tokenizer has vocab_size=4000, the model only 3999"),
    ({"tokenizer": "/none"}, r"data\.tokenizer: /none: no such tokenizer file"),
])  # fmt: skip
def test_refusals(prefix: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batches(prefix, **options)


def test_files_that_are_missing_are_named_with_their_setting(prefix: str) -> None:
    with pytest.raises(ValueError, match=r"^data\.train: nope\.idx: no such file"):
        batches("nope")
    sizes = {"seq_len": S, "samples": 1, "micro_batch_size": 1, "dp_rank": 0, "dp_size": 1, "vocab_size": VOCAB}
    with pytest.raises(ValueError, match=r"^data\.valid: nope\.idx: no such file"):
        evaluation_batches(DataConfig(), "nope", **sizes)  # type: ignore[arg-type]


def test_files_without_a_label_are_refused(tmp_path: Path) -> None:
    single = write(tmp_path / "single", [1] * 50)
    late = write(tmp_path / "late", [1] * 50 + [2])
    sizes = {"seq_len": S, "micro_batch_size": 1, "dp_rank": 1, "dp_size": 2, "vocab_size": VOCAB}
    config = DataConfig(document_attention=True)
    batches(single)  # one text: every token but the last has a label
    batches(late, document_attention=True)
    with pytest.raises(ValueError, match=r"^data\.train: .*single: with data\.document_attention none of its first 50 tokens"):
        batches(single, document_attention=True)
    # Whether anything counts is a matter of the samples that are evaluated, and every rank knows it.
    evaluation_batches(config, write(tmp_path / "early", [2] + [1] * 50), samples=2, **sizes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^data\.valid: .*late: .*none of its first 17 tokens has a label"):
        evaluation_batches(config, late, samples=2, **sizes)  # type: ignore[arg-type]


def test_config_violations() -> None:
    assert DataConfig().violations() == []
    assert DataConfig(num_workers=-1).violations() == ["data.num_workers: -1 must lie in [0, 256]"]


def test_negative_step(prefix: str) -> None:
    with pytest.raises(ValueError, match="step: -1 must not be negative"):
        batches(prefix).micro_batches(-1)


def test_without_a_sidecar_the_largest_id_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "a", [50])
    Path(f"{path}.json").unlink()
    check_token_file(DataConfig(), path, 50, setting="data.train")
    with pytest.raises(
        ValueError, match=r"data\.valid: .*a\.bin: token id 49 lies outside the model's vocabulary, vocab_size=49"
    ):
        check_token_file(DataConfig(), path, 49, setting="data.valid")


def test_tokens_of_another_tokenizer_are_refused(token_file: str, tokenizer_path: Path, tmp_path: Path) -> None:
    check_token_file(DataConfig(tokenizer=str(tokenizer_path)), token_file, 700, setting="data.train")
    other = tmp_path / "other.model"
    other.write_bytes(tokenizer_path.read_bytes() + b"\n")
    with pytest.raises(ValueError, match=r"data\.tokenizer: .*other\.model has SHA-256 .* made with another tokenizer"):
        check_token_file(DataConfig(tokenizer=str(other)), token_file, 700, setting="data.train")
    with pytest.raises(ValueError, match=r"none\.model: no such tokenizer file"):
        check_token_file(DataConfig(tokenizer=str(tmp_path / "none.model")), token_file, 700, setting="data.train")


def test_fingerprint_changes_with_the_data(tmp_path: Path) -> None:
    first = batches(write(tmp_path / "a", [30, 30])).fingerprint
    assert batches(write(tmp_path / "b", [30, 30])).fingerprint == first
    assert batches(write(tmp_path / "a", [30, 31])).fingerprint != first


def test_closing_ends_thread_and_workers(prefix: str) -> None:
    threads, kids = threading.active_count(), set(children())
    for workers in (0, 2):
        reader = batches(prefix, num_workers=workers)
        reader.micro_batches(0)
        assert threading.active_count() > threads
        reader.close()
        reader = batches(prefix, num_workers=workers)
        reader.micro_batches(0)
        del reader  # forgetting it is as good
        # The feeder threads of the DataLoader's queues end a moment after its workers.
        deadline = time.monotonic() + 20
        while (threading.active_count() > threads or set(children()) - kids) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert threading.active_count() == threads
        assert set(children()) <= kids


def children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


SIGNALLED = """
import json, os, signal, sys
from megagrin.data.loader import DataConfig, GlobalBatches
signal.signal(signal.SIGTERM, lambda *_: None)
os.setpgrp()
reader = GlobalBatches(
    DataConfig(num_workers=2), sys.argv[1],
    seq_len=8, global_batch_size=4, micro_batch_size=1, dp_rank=0, dp_size=1, seed=5, vocab_size=4000,
)
first = [batch.tokens_BS.tolist() for step in range(20) for batch in reader.micro_batches(step)]
os.killpg(0, signal.SIGTERM)
print(json.dumps(first + [batch.tokens_BS.tolist() for step in range(20, 60) for batch in reader.micro_batches(step)]))
"""


def test_workers_survive_a_signal_to_the_whole_job_and_the_process_still_ends(prefix: str) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SIGNALLED, prefix], capture_output=True, text=True, timeout=120, check=False
    )
    assert (run.returncode, run.stderr) == (0, "")
    reader = batches(prefix)
    assert json.loads(run.stdout) == [b.tokens_BS.tolist() for step in range(60) for b in reader.micro_batches(step)]
