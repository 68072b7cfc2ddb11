"""Stored image features that a mix of senses is drawn towards: ImageBind-LLM's visual cache.

V stored vectors   E ImageBind's space

The original asks a faiss index for the nearest vectors. Here they are an array and the search is exact, so of faiss
files only the flat kinds are read, which hold the vectors themselves (faiss/impl/index_write.cpp).
"""

import dataclasses
import struct
from pathlib import Path

import numpy as np

from mmjax.data.arrays import read_npy

FLAT = (b"IxFI", b"IxF2", b"IxFl")  # flat: inner product, squared distance, any other metric
INNER_PRODUCT = 0
KINDS = {  # of other faiss indexes, by the beginning of their names in a file
    b"Iw": "inverted lists", b"IH": "a graph, HNSW", b"IN": "a graph, NSG or NN-descent",
    b"IxPT": "transformed vectors", b"IxP": "product quantisation", b"IxS": "scalar quantisation",
    b"IxM": "another index under ids of its own", b"IB": "binary vectors"}
# Behind the kind: dimension, vectors, two unused numbers, trained?, metric.
HEADER = struct.Struct("<iqqq?i")


@dataclasses.dataclass(frozen=True, eq=False)
class Recall:
    """What to remember, and how strongly; see `mmjax.models.bind.recall`. The defaults are the original's.

    vectors:   float32[V,E], of length 1; `read` reads them from a file
    count:     nearest vectors that are looked at
    sharpness: how much the nearest of them count above the others
    weight:    of what is remembered against what is there, from 0 to 1

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
            wrong.append(f"count = {self.count}, but must be from 1 to {len(vectors)}, the vectors there are")
        if not 0 <= self.weight <= 1:
            wrong.append(f"weight = {self.weight}, but must be from 0 to 1")
        if wrong:
            raise ValueError("Nothing can be recalled with these settings:\n  " + "\n  ".join(wrong))


def read(path: str | Path) -> np.ndarray:
    """float32[V,E] of a .npy file, or of a flat faiss index.

    Raises FileNotFoundError, or ValueError naming the file and what it is instead.
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
        what = "neither a .npy file nor a faiss index"
        if kind[:1] == b"I" and kind.isalnum():
            known = next((words for start, words in KINDS.items() if kind.startswith(start)), "unknown here")
            what = f"a faiss index of the kind {kind.decode()} ({known})"
        raise ValueError(
            f"{path} is {what}. Exact vectors are needed: a .npy file of float32[V,E], or a flat faiss index (in "
            "Python with faiss: `numpy.save('vectors.npy', index.reconstruct_n(0, index.ntotal))`, of inverted lists "
            "after `index.make_direct_map()`).")
    with open(path, "rb") as file:
        head = file.read(4 + HEADER.size)
        if len(head) < 4 + HEADER.size:
            raise ValueError(f"{path} is a faiss index that is cut off.")
        width, count, *_, metric = HEADER.unpack_from(head, 4)
        if metric > 1:  # those have a number of their own
            file.read(4)
        held = int.from_bytes(file.read(8), "little")
        if width <= 0 or count < 0 or held != count * width:
            raise ValueError(f"{path} is a damaged faiss index: it says that {count} vectors of {width} numbers are "
                             f"{held} numbers.")
        if (rest := path.stat().st_size - file.tell()) != 4 * held:
            raise ValueError(f"{path} is a damaged faiss index: {rest} bytes of vectors, expected {4 * held}.")
        vectors = np.fromfile(file, "<f4").reshape(count, width).astype(np.float32)
    if metric != INNER_PRODUCT and not np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3):
        raise ValueError(f"{path} is a faiss index that compares vectors of different lengths by their distance; here "
                         "the inner product says what is near. Bring the vectors to length 1.")
    return vectors
