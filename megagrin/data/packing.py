"""Documents packed into training samples: which tokens sample number n holds, as a function of (seed, n) alone.

An epoch puts the documents into a shuffled order, back to back, and cuts the stream into samples of seq_len + 1 tokens, each
overlapping the next by one token so that every label but the stream's first token is predicted once. The samples are then
shuffled too, or the pieces of a long document would follow each other in a batch. No sample spans two epochs: the
(tokens - 1) mod seq_len tokens at the end of an epoch's stream are left out, other ones in each epoch.

Array suffixes: D non-empty documents, N samples of an epoch, S = seq_len.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from megagrin.data_prep.indexed import IndexedDataset
from megagrin.rng import stream_key

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sample:
    """One training sample, or several with a leading dimension.

    Attributes:
        index: int64 (), its number in the endless order.
        tokens: int64 (S + 1,).
        documents: int64 (S + 1,), 0 for the tokens of the sample's first document, 1 for the second, and so on.
    """

    index: Int64Array
    tokens: Int64Array
    documents: Int64Array


@dataclass(frozen=True)
class _Epoch:
    number: int
    documents_D: npt.NDArray[np.integer]  # document numbers in stream order
    ends_D: Int64Array  # stream position after each of them
    samples_N: npt.NDArray[np.integer]  # position in the stream of each sample, in units of S


class PackedDataset(Dataset[Sample]):
    """Endless sequence of samples over a token file, epoch after epoch; reading one touches only its own tokens.

    The order of the epoch last asked for is kept, so reading should move forward. Memory: 12 bytes per document and 4 per
    sample (16 and 8 from 2^31 of them).

    Args:
        dataset: the token file.
        seq_len: S, tokens a sample trains on.
        seed: run seed.
        shuffle: False keeps documents and samples in file order in every epoch.

    Raises:
        ValueError: `seq_len` is not positive, or the file has fewer than seq_len + 1 tokens.
    """

    def __init__(self, dataset: IndexedDataset, *, seq_len: int, seed: int, shuffle: bool) -> None:
        if seq_len < 1:
            raise ValueError(f"seq_len: {seq_len} must be positive")
        if dataset.tokens <= seq_len:
            raise ValueError(
                f"{dataset.prefix}: {dataset.tokens} tokens are too few for one sample of seq_len + 1 = {seq_len + 1} tokens"
            )
        self.dataset = dataset
        self.seq_len = seq_len
        self.seed = seed
        self.shuffle = shuffle
        self.samples_per_epoch = (dataset.tokens - 1) // seq_len
        self._epoch: _Epoch | None = None

    def __getitem__(self, index: int) -> Sample:
        """Sample `index` ≥ 0 of the endless order: number index mod N of epoch index // N."""
        number, position = divmod(index, self.samples_per_epoch)
        epoch = self._epoch
        if epoch is None or epoch.number != number:
            epoch = self._epoch = self._build_epoch(number)
        start = int(epoch.samples_N[position]) * self.seq_len
        return self._cut(epoch, index, start, start + self.seq_len + 1)

    def _cut(self, epoch: _Epoch, index: int, start: int, end: int) -> Sample:
        first = int(np.searchsorted(epoch.ends_D, start, side="right"))
        last = int(np.searchsorted(epoch.ends_D, end, side="left"))
        edges = np.concatenate([[start], epoch.ends_D[first:last], [end]])
        lengths = edges[1:] - edges[:-1]
        begins = self.dataset.document_offsets_D[epoch.documents_D[first : last + 1]]
        # Only the first document can have begun before the sample; what is left of it is counted from its end.
        begins[0] = self.dataset.document_offsets_D[epoch.documents_D[first] + 1] - (epoch.ends_D[first] - start)
        pieces = [self.dataset.tokens_T[b : b + n] for b, n in zip(begins.tolist(), lengths.tolist(), strict=True)]
        return Sample(np.array(index), np.concatenate(pieces).astype(np.int64), np.repeat(np.arange(lengths.size), lengths))

    def _build_epoch(self, number: int) -> _Epoch:
        lengths = np.diff(self.dataset.document_offsets_D)
        nonempty_D = _narrow(np.flatnonzero(lengths))
        documents_D = nonempty_D[self._order("documents", number, nonempty_D.size)]
        samples_N = self._order("samples", number, self.samples_per_epoch)
        return _Epoch(number, documents_D, np.cumsum(lengths[documents_D], dtype=np.int64), samples_N)

    def _order(self, name: str, epoch: int, size: int) -> npt.NDArray[np.integer]:
        """A permutation as the sorting order of random 64-bit words.

        numpy promises the words of a bit generator for good; the streams of its `Generator.permutation` may change.
        """
        if not self.shuffle:
            return _narrow(np.arange(size))
        key = np.array(stream_key(self.seed, f"data/{name}/{epoch}"), dtype=np.uint64)
        return _narrow(np.argsort(np.random.Philox(key=key).random_raw(size), kind="stable"))


def label_violations(setting: str, dataset: IndexedDataset, tokens: int) -> list[str]:
    """Whether data.document_attention leaves a label among the first `tokens` tokens of a file, in file order.

    Args:
        setting: names the file in the answer.
        dataset: the token file.
        tokens: how many of its tokens count.

    Returns:
        Nothing, or the broken rule: a document's last token has no label, so one document must have two tokens there.
    """
    offsets_D = dataset.document_offsets_D
    if int((np.minimum(offsets_D[1:], tokens) - offsets_D[:-1]).max(initial=0)) > 1:
        return []
    return [
        f"{setting}: {dataset.prefix}: with data.document_attention none of its first {tokens} tokens has a label: "
        "no document has two of them"
    ]


def _narrow(array: Int64Array) -> npt.NDArray[np.integer]:
    return array.astype(np.int32) if array.size < 2**31 and array.max(initial=0) < 2**31 else array
