"""Item vectors as RecBole's atomic files, for models that know text or images (VBPR).

    python benchmarks/features.py --source=../shared/data/ml-100k-mm --out=DATA
    python benchmarks/features.py --source=../shared/data/citeulike-t --out=DATA

Each command writes the folder DATA/<dataset>. It has links to the .inter files of the source, and
for each kind of vectors a file ``<dataset>.text`` (columns tid, text_vec) or ``<dataset>.image``
(vid, image_vec). ml-100k-mm has vectors of both kinds (row = item token − 1). citeulike-t has word
counts (row = item token). They are weighted by TF-IDF, scaled to length 1 for each item, and
reduced to ``--size`` dimensions by a truncated singular value decomposition.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from scipy.sparse.linalg import svds

KINDS = {"text": ("tid", "text_vec"), "image": ("vid", "image_vec")}


def main() -> None:
    """Read the source and write the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--source", type=Path, required=True, help="folder of a dataset of ../shared/data"
    )
    parser.add_argument("--out", type=Path, required=True, help="data path to write to")
    parser.add_argument(
        "--size", type=int, default=128, help="dimensions that word counts are reduced to"
    )
    options = parser.parse_args()
    name = options.source.resolve().name
    folder = options.out / name
    folder.mkdir(parents=True, exist_ok=True)
    for file in options.source.glob("*.inter"):
        link = folder / file.name
        link.unlink(missing_ok=True)
        link.symlink_to(file.resolve())
    for kind in KINDS:
        given = options.source / f"{kind}_feat.npy"
        if given.exists():
            write(folder / f"{name}.{kind}", kind, np.load(given), first_token=1)
    counts = options.source / "item_text_bow.npz"
    if counts.exists():
        vectors = reduced(scipy.sparse.load_npz(counts), options.size)
        write(folder / f"{name}.text", "text", vectors, first_token=0)


def reduced(counts: Any, size: int) -> np.ndarray[Any, Any]:
    """The ``size`` leading components ``U Σ`` of TF-IDF weights with rows of length 1.

    The weights are ``(1 + log tf) · log(n / df)``.
    """
    weights = scipy.sparse.csr_matrix(counts, dtype=np.float64)
    weights.eliminate_zeros()
    documents = np.bincount(weights.indices, minlength=weights.shape[1])
    weights.data = (1 + np.log(weights.data)) * np.log(
        weights.shape[0] / documents[weights.indices]
    )
    length = np.sqrt(weights.multiply(weights).sum(axis=1)).A1
    weights = scipy.sparse.diags(1 / np.where(length > 0, length, 1)) @ weights
    left, values, _ = svds(weights, k=size, random_state=0)
    components: np.ndarray[Any, Any] = left * values
    return components[:, ::-1]


def write(path: Path, kind: str, vectors: np.ndarray[Any, Any], first_token: int) -> None:
    """Write one atomic file; an item whose vector is zero gets no row."""
    id_field, field = KINDS[kind]
    with path.open("w", encoding="utf-8") as file:
        file.write(f"{id_field}:token\t{field}:float_seq\n")
        for token, vector in enumerate(vectors, first_token):
            if vector.any():
                file.write(f"{token}\t{' '.join(f'{value:.5g}' for value in vector)}\n")
    print(
        f"{path}: {vectors.shape[1]} dimensions, {int(vectors.any(axis=1).sum())} of "
        f"{len(vectors)} items"
    )


if __name__ == "__main__":
    main()
