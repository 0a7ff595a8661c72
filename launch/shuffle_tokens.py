"""The control experiment's data: the same tokens and document lengths, every label in a random place.

A model can still learn how frequent each token is, and nothing else.
"""

import argparse

import numpy as np

from megagrin.data_prep.indexed import IndexedDataset, IndexedDatasetWriter


def main() -> None:
    """Write a token file whose tokens are a fixed random permutation of another's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", required=True, help="prefix of a token file")
    parser.add_argument("--out", required=True, help="prefix to write")
    options = parser.parse_args()
    source = IndexedDataset(options.source)
    if source.sidecar is None:
        raise SystemExit(f"megagrin: error: {options.source}.json is missing")
    shuffled_T = np.random.default_rng(0).permutation(source.tokens_T)
    with IndexedDatasetWriter(options.out, source.sidecar.provenance()) as writer:
        for start, end in zip(source.document_offsets_D[:-1], source.document_offsets_D[1:], strict=True):
            writer.add(shuffled_T[start:end])


if __name__ == "__main__":
    main()
