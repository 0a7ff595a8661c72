"""Training and evaluation batches: what a rank trains on at a step, as a pure function of (data, seed, step).

Shape suffixes: B sequences, S positions; BS is a tensor (B, S).
"""

import atexit
import signal
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from megagrin.data.packing import PackedDataset, Sample, label_violations
from megagrin.data_prep.files import named
from megagrin.data_prep.indexed import IndexedDataset
from megagrin.data_prep.verify import check_tokenizer
from megagrin.kernels.cross_entropy import IGNORE

IGNORED_LABEL = IGNORE
# Longest wait for one step's batches: storage that answers slower than this is taken for dead.
_TIMEOUT_SECONDS = 600.0
MAX_WORKERS = 256  # processes for one rank: more is a slip of the keyboard


@dataclass(frozen=True)
class DataConfig:
    """Token files and how they are read.

    Args:
        train: prefix of the training token files (<train>.bin and <train>.idx).
        valid: prefix of the validation token files; none means no evaluation.
        tokenizer: the SentencePiece model the tokens were made with; token files of another one are refused.
        document_attention: attention, positions and labels stay inside a document; otherwise a sample is one text.
        shuffle: a new order of documents and samples in each epoch; false keeps the order of the file.
        num_workers: processes that read ahead; 0 reads ahead in one thread, which is enough for local disks.
    """

    train: str | None = None
    valid: str | None = None
    tokenizer: str | None = None
    document_attention: bool = False
    shuffle: bool = True
    num_workers: int = 0

    def violations(self) -> list[str]:
        """Every broken rule of this section, as `field: value and rule`."""
        if 0 <= self.num_workers <= MAX_WORKERS:
            return []
        return [f"data.num_workers: {self.num_workers} must lie in [0, {MAX_WORKERS}]"]


@dataclass(frozen=True)
class Batch:
    """One micro-batch, int64 tensors of shape (B, S).

    Attributes:
        tokens_BS: token ids.
        labels_BS: the next token of each position, -100 where there is nothing to learn.
        positions_BS: position in the sequence, or in the document with `document_attention`.
        documents_BS: number of the document inside its sequence, counted from 0; None without `document_attention`.
        token_index_BS: (number of the sample in its global batch)·S + position in the sequence.
    """

    tokens_BS: Tensor
    labels_BS: Tensor
    positions_BS: Tensor
    documents_BS: Tensor | None
    token_index_BS: Tensor

    def to(self, device: torch.device | str) -> Self:
        """The same batch on a device; copies to a GPU come from pinned memory and do not make the host wait."""
        pin = torch.device(device).type == "cuda"
        moved = {
            name: (value.pin_memory() if pin and not value.is_cuda else value).to(device, non_blocking=pin)
            for name, value in vars(self).items()
            if value is not None
        }
        return replace(self, **moved)


def check_token_file(config: DataConfig, prefix: str, vocab_size: int, *, setting: str) -> IndexedDataset:
    """Opens token files and refuses those that do not fit the model or the tokenizer.

    Args:
        config: its `tokenizer` must be the one of the sidecar, where both are known.
        prefix: path without suffix.
        vocab_size: of the model. Without a sidecar the whole file is read to find its largest id.
        setting: that names the prefix, for the message.

    Raises:
        ValueError: damaged files, a vocabulary larger than the model's, or tokens of another tokenizer.
    """
    with named(setting):
        dataset = IndexedDataset(prefix)
        _refuse_ids_beyond(dataset, vocab_size)
    if config.tokenizer is not None:
        with named("data.tokenizer"):
            check_tokenizer(dataset, config.tokenizer)
    return dataset


def _refuse_ids_beyond(dataset: IndexedDataset, vocab_size: int) -> None:
    if dataset.sidecar is None:
        smallest, largest = dataset.token_id_range()
        if smallest < 0 or largest >= vocab_size:
            bad = smallest if smallest < 0 else largest
            raise ValueError(f"{dataset.prefix}.bin: token id {bad} lies outside the model's vocabulary, vocab_size={vocab_size}")
    elif dataset.sidecar.vocab_size > vocab_size:
        raise ValueError(
            f"{dataset.prefix}: its tokenizer has vocab_size={dataset.sidecar.vocab_size}, the model only {vocab_size}"
        )


def _refuse_without_labels(config: DataConfig, dataset: IndexedDataset, tokens: int, setting: str) -> None:
    if config.document_attention and (broken := label_violations(setting, dataset, tokens)):
        raise ValueError(broken[0])


class GlobalBatches:
    """The micro-batches of one rank, step by step.

    The global batch of step n (from 0) is the samples [n·B, (n + 1)·B) of the order of `PackedDataset`; rank r takes the
    block [r·B/dp, (r + 1)·B/dp) of it and cuts it into micro-batches. Asking for the steps in order reads ahead in the
    background; any other step may be asked for at any time. Nothing is stored between runs: resuming is asking for the next
    step, with any number of ranks, workers and micro-batches.

    Args:
        config: how to read.
        prefix: token files.
        seq_len: S.
        global_batch_size: samples per step over all ranks, B.
        micro_batch_size: samples per batch.
        dp_rank, dp_size: this rank and the number of ranks.
        seed: run seed, which fixes the order.
        vocab_size: of the model.

    Attributes:
        samples_per_epoch: samples before a document is met again.
        fingerprint: changes when the token files do; a resumed run should find the one it was begun with.

    Raises:
        ValueError: damaged or unfitting token files, too few tokens for one sample, or sizes that do not divide.
    """

    def __init__(
        self,
        config: DataConfig,
        prefix: str,
        *,
        seq_len: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
        vocab_size: int,
    ) -> None:
        if min(global_batch_size, micro_batch_size) < 1 or global_batch_size % (dp_size * micro_batch_size):
            raise ValueError(
                f"global_batch_size: {global_batch_size} must be a positive multiple of "
                f"dp_size × micro_batch_size = {dp_size} × {micro_batch_size}"
            )
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"dp_rank: {dp_rank} must lie in [0, dp_size={dp_size})")
        dataset = check_token_file(config, prefix, vocab_size, setting="data.train")
        _refuse_without_labels(config, dataset, dataset.tokens, "data.train")
        self.fingerprint = dataset.fingerprint()
        self._samples = PackedDataset(dataset, seq_len=seq_len, seed=seed, shuffle=config.shuffle)
        self.samples_per_epoch = self._samples.samples_per_epoch
        self._config = config
        self._global_batch_size, self._micro_batch_size = global_batch_size, micro_batch_size
        self._first = dp_rank * (global_batch_size // dp_size)
        self._micro_batches = global_batch_size // (dp_size * micro_batch_size)
        self._reader: _ReadAhead | None = None
        self._end_reader: weakref.finalize | None = None

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of optimizer step `step`, counted from 0.

        Raises:
            ValueError: `step` is negative.
            TimeoutError: the storage did not answer within 600 s.
        """
        if step < 0:
            raise ValueError(f"step: {step} must not be negative")
        if self._reader is None or self._reader.next_step != step:
            self.close()
            self._reader = _ReadAhead(self._read_from(step), step, self._micro_batches)
            self._end_reader = weakref.finalize(self, self._reader.close)
        return self._reader.take()

    def close(self) -> None:
        """Ends the background reading; a later `micro_batches` starts it again."""
        if self._end_reader is not None:
            self._end_reader()
        self._reader = self._end_reader = None

    def _read_from(self, step: int) -> Iterator[Batch]:
        order = _MicroBatchOrder(step, self._global_batch_size, self._first, self._micro_batches, self._micro_batch_size)
        workers = self._config.num_workers
        loader = DataLoader(
            self._samples,
            batch_sampler=order,
            collate_fn=_stack,
            num_workers=workers,
            # A step ahead of the one being trained, and its own generator: iterating draws a number from the global one.
            prefetch_factor=max(2, -(-2 * self._micro_batches // workers)) if workers else None,
            generator=torch.Generator(),
            worker_init_fn=_ignore_signals,
            timeout=_TIMEOUT_SECONDS if workers else 0,
        )
        attention = self._config.document_attention
        finish = partial(_to_batch, global_batch_size=self._global_batch_size, document_attention=attention)
        # Workers start here, not in the reading thread: forking is safest from the thread that owns the process.
        return map(finish, iter(loader))


@dataclass(frozen=True)
class _MicroBatchOrder:
    """Batch sampler: sample numbers of one rank's micro-batches from step `step` on, without end."""

    step: int
    global_batch_size: int
    first: int
    micro_batches: int
    micro_batch_size: int

    def __iter__(self) -> Iterator[list[int]]:
        step = self.step
        while True:
            for number in range(self.micro_batches):
                start = step * self.global_batch_size + self.first + number * self.micro_batch_size
                yield list(range(start, start + self.micro_batch_size))
            step += 1


class _ReadAhead:
    """Takes the micro-batches of a step while the step before is being trained."""

    def __init__(self, batches: Iterator[Batch], step: int, micro_batches: int) -> None:
        self.next_step = step
        self._micro_batches = micro_batches
        self._batches: Iterator[Batch] | None = batches
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="megagrin-data")
        self._pending = self._submit()
        # Workers ignore SIGTERM, by which the DataLoader's own clean-up at exit would end them, so they are told before.
        atexit.register(self.close)

    def _submit(self) -> Future[list[Batch]]:
        assert self._batches is not None, "reading goes on after close()"
        return self._thread.submit(list, islice(self._batches, self._micro_batches))

    def take(self) -> list[Batch]:
        try:
            batches = self._pending.result(_TIMEOUT_SECONDS)
        except TimeoutError as error:
            raise TimeoutError(f"step {self.next_step}: the token files did not answer in {_TIMEOUT_SECONDS:g} s") from error
        self.next_step += 1
        self._pending = self._submit()
        return batches

    def close(self) -> None:
        atexit.unregister(self.close)
        self._thread.shutdown(cancel_futures=True)
        self._batches = None  # the last reference: the DataLoader ends its workers


def _ignore_signals(worker: int) -> None:
    """A signal to the whole job means `save, then stop`; workers that die of it would take the step in progress with them."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _stack(samples: Sequence[Sample]) -> Sample:
    """Samples as arrays with a leading dimension B; numpy, as tensors would cross processes by way of /dev/shm."""
    return Sample(
        np.array([sample.index for sample in samples]),
        np.stack([sample.tokens for sample in samples]),
        np.stack([sample.documents for sample in samples]),
    )


def _to_batch(stacked: Sample, *, global_batch_size: int, document_attention: bool) -> Batch:
    tokens, documents = torch.from_numpy(stacked.tokens), torch.from_numpy(stacked.documents)
    number_B = torch.from_numpy(stacked.index % global_batch_size)
    size, seq_len = tokens.shape[0], tokens.shape[1] - 1
    place_S = torch.arange(seq_len)
    labels_BS, positions_BS, documents_BS = tokens[:, 1:].contiguous(), place_S.repeat(size, 1), None
    if document_attention:
        ends_BS = documents[:, 1:] != documents[:, :-1]
        labels_BS = labels_BS.masked_fill(ends_BS, IGNORED_LABEL)
        documents_BS = documents[:, :-1].contiguous()
        # A document starts after the end of the one before; its start is carried to its other positions.
        starts_BS = torch.zeros_like(documents_BS)
        starts_BS[:, 1:] = torch.where(ends_BS[:, :-1], place_S[1:], 0)
        positions_BS = place_S - starts_BS.cummax(dim=1).values
    return Batch(
        tokens_BS=tokens[:, :-1].contiguous(),
        labels_BS=labels_BS,
        positions_BS=positions_BS,
        documents_BS=documents_BS,
        token_index_BS=number_B.unsqueeze(1) * seq_len + place_S,
    )


def evaluation_batches(
    config: DataConfig,
    prefix: str,
    *,
    seq_len: int,
    samples: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    vocab_size: int,
) -> list[Batch]:
    """This rank's share of the first `samples` samples of a token file in file order (all of them when there are fewer).

    Every rank gets the same number of full batches, as sharded parameters need; the last ones are filled up with samples
    whose labels are all -100.

    Args:
        config: `document_attention` and `tokenizer` count, `shuffle` does not.
        prefix: token files.
        seq_len: S.
        samples: number of samples over all ranks, at least 1.
        micro_batch_size: samples per batch.
        dp_rank, dp_size: this rank and the number of ranks.
        vocab_size: of the model.

    Raises:
        ValueError: as `GlobalBatches`.
    """
    if min(samples, micro_batch_size) < 1:
        raise ValueError(f"samples: {samples} and micro_batch_size: {micro_batch_size} must be positive")
    dataset = check_token_file(config, prefix, vocab_size, setting="data.valid")
    packed = PackedDataset(dataset, seq_len=seq_len, seed=0, shuffle=False)
    count = min(samples, packed.samples_per_epoch)
    _refuse_without_labels(config, dataset, count * seq_len + 1, "data.valid")
    per_rank = -(-count // (dp_size * micro_batch_size)) * micro_batch_size
    first = dp_rank * per_rank
    return [
        _evaluation_batch(packed, range(start, start + micro_batch_size), count, config.document_attention)
        for start in range(first, first + per_rank, micro_batch_size)
    ]


def _evaluation_batch(packed: PackedDataset, indices: range, count: int, document_attention: bool) -> Batch:
    stacked = _stack([packed[min(index, count - 1)] for index in indices])
    batch = _to_batch(stacked, global_batch_size=count, document_attention=document_attention)
    is_filler_B = torch.tensor([index >= count for index in indices])
    return replace(batch, labels_BS=batch.labels_BS.masked_fill(is_filler_B.unsqueeze(1), IGNORED_LABEL))
