"""How many samples a file holds: a sample takes seq_len tokens and shares its last label with the next one's first token."""

from pathlib import Path

import numpy as np
import pytest

from megagrin.data.packing import PackedDataset
from megagrin.data_prep.indexed import IndexedDataset, IndexedDatasetWriter
from megagrin.data_prep.sidecar import Provenance


@pytest.mark.parametrize(
    ("tokens", "seq_len", "samples"), [(9, 4, 2), (8, 4, 1), (10, 4, 2), (13, 4, 3), (5, 4, 1), (2, 1, 1), (3, 1, 2)]
)
def test_samples_of_an_epoch(tmp_path: Path, tokens: int, seq_len: int, samples: int) -> None:
    """tokens = samples · seq_len + 1 is enough, one token less is not."""
    with IndexedDatasetWriter(tmp_path / "a", Provenance(100)) as writer:
        writer.add(np.arange(tokens))
    packed = PackedDataset(IndexedDataset(tmp_path / "a"), seq_len=seq_len, seed=0, shuffle=False)
    assert packed.samples_per_epoch == samples
    assert [packed[i].tokens.tolist() for i in range(samples)] == [
        list(range(i * seq_len, (i + 1) * seq_len + 1)) for i in range(samples)
    ]
    assert packed[samples].tokens.tolist() == packed[0].tokens.tolist()
