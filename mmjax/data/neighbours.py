"""ImageBind-LLM's visual cache: stored image features that are mixed with the features of an input.

V stored vectors   E ImageBind's space

The original finds the nearest vectors with a faiss index. Here they are an array and the search is exact, so only flat
faiss indexes are read, which store the vectors themselves (faiss/impl/index_write.cpp).
"""

import dataclasses
import struct
from pathlib import Path

import numpy as np

from mmjax.data.arrays import read_npy

FLAT = (b"IxFI", b"IxF2", b"IxFl")  # flat: inner product, squared distance, any other metric
INNER_PRODUCT = 0
KINDS = {  # other faiss indexes by the prefix of their code
    b"Iw": "inverted lists", b"IH": "a graph, HNSW", b"IN": "a graph, NSG or NN-descent",
    b"IxPT": "transformed vectors", b"IxP": "product quantisation", b"IxS": "scalar quantisation",
    b"IxM": "another index with its own ids", b"IB": "binary vectors"}
# After the code: dimension, vectors, two unused numbers, trained?, metric.
HEADER = struct.Struct("<iqqq?i")


@dataclasses.dataclass(frozen=True, eq=False)
class Recall:
    """Vectors to recall and their weights; see `mmjax.models.bind.recall`. The defaults are the original's.

    vectors:   float32[V,E], of length 1; `read` reads them from a file
    count:     number of nearest vectors
    sharpness: inverse temperature of their weights
    weight:    of the recalled vectors relative to the input, from 0 to 1

    Raises ValueError naming the values that cannot be used.
    """

    vectors: np.ndarray
    count: int = 10
    sharpness: float = 20.0
    weight: float = 0.5

    def __post_init__(self):
        vectors = self.vectors
        if vectors.ndim != 2 or not np.issubdtype(vectors.dtype, np.floating):
            raise ValueError(f"The vectors to recall must be float[V,E], got {vectors.dtype}{list(vectors.shape)}.")
        wrong = []
        if not 1 <= self.count <= len(vectors):
            wrong.append(f"count = {self.count}, but must be from 1 to {len(vectors)}, the number of vectors")
        if not 0 <= self.weight <= 1:
            wrong.append(f"weight = {self.weight}, but must be from 0 to 1")
        if wrong:
            raise ValueError("Nothing can be recalled with these settings:\n  " + "\n  ".join(wrong))


def read(path: str | Path) -> np.ndarray:
    """Returns float32[V,E] of a .npy file or a flat faiss index.

    Raises FileNotFoundError, or ValueError naming the file and its actual content.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There are no vectors at {path}.")
    with open(path, "rb") as file:
        start = file.read(6)
    vectors = _npy(path) if start == b"\x93NUMPY" else _flat_index(path, start[:4])
    if not np.isfinite(vectors).all():
        raise ValueError(f"{path} holds vectors that are not finite.")
    return vectors


def _npy(path: Path) -> np.ndarray:
    try:
        vectors = read_npy(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if vectors.ndim != 2 or not np.issubdtype(vectors.dtype, np.floating):
        raise ValueError(f"{path} must hold float[V,E], but holds {vectors.dtype}{list(vectors.shape)}.")
    return vectors.astype(np.float32)


def _flat_index(path: Path, kind: bytes) -> np.ndarray:
    if kind not in FLAT:
        content = "neither a .npy file nor a faiss index"
        if kind[:1] == b"I" and kind.isalnum():
            known = next((name for start, name in KINDS.items() if kind.startswith(start)), "unknown here")
            content = f"a faiss index of the kind {kind.decode()} ({known})"
        raise ValueError(
            f"{path} is {content}. Exact vectors are needed: a .npy file of float32[V,E], or a flat faiss index (in "
            "Python with faiss: `numpy.save('vectors.npy', index.reconstruct_n(0, index.ntotal))`, of inverted lists "
            "after `index.make_direct_map()`).")
    with open(path, "rb") as file:
        head = file.read(4 + HEADER.size)
        if len(head) < 4 + HEADER.size:
            raise ValueError(f"{path} is a faiss index that is cut off.")
        width, count, *_, metric = HEADER.unpack_from(head, 4)
        if metric > 1:  # followed by the metric's argument
            file.read(4)
        total = int.from_bytes(file.read(8), "little")
        if width <= 0 or count < 0 or total != count * width:
            raise ValueError(f"{path} is a damaged faiss index: it says that {count} vectors of {width} numbers are "
                             f"{total} numbers.")
        if (rest := path.stat().st_size - file.tell()) != 4 * total:
            raise ValueError(f"{path} is a damaged faiss index: {rest} bytes of vectors, expected {4 * total}.")
        vectors = np.fromfile(file, "<f4").reshape(count, width).astype(np.float32)
    if metric != INNER_PRODUCT and not np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3):
        raise ValueError(f"{path} is a faiss index that compares vectors of different lengths by their distance, but "
                         "the nearest ones are found by inner product here. Normalise the vectors to length 1.")
    return vectors
