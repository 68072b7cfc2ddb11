"""Stored vectors: .npy files and faiss indexes, whose bytes are written here."""

import struct

import numpy as np
import pytest

from mmjax.data.neighbours import Recall, read

VECTORS = np.random.default_rng(0).normal(size=(7, 5)).astype("<f4")
UNIT = VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)


def index(kind, vectors=UNIT, metric=0, held=None, extra=b""):
    """A faiss index as index_write.cpp writes it: kind, header, number of floats, floats."""
    count, width = vectors.shape
    head = struct.pack("<4siqqq?i", kind, width, count, 1 << 20, 1 << 20, True, metric)
    return head + extra + struct.pack("<Q", vectors.size if held is None else held) + vectors.tobytes()


@pytest.mark.parametrize("content", [
    index(b"IxFI"), index(b"IxF2", metric=1), index(b"IxFl", metric=4, extra=struct.pack("<f", 3.0))],
    ids=["inner product", "distance", "another metric"])
def test_flat_indexes(content, tmp_path):
    (tmp_path / "knn.index").write_bytes(content)
    vectors = read(tmp_path / "knn.index")
    assert vectors.dtype == np.float32 and vectors.flags.writeable
    np.testing.assert_array_equal(vectors, UNIT)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_arrays(dtype, tmp_path):
    np.save(tmp_path / "vectors.npy", VECTORS.astype(dtype))
    vectors = read(tmp_path / "vectors.npy")
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, VECTORS.astype(dtype).astype(np.float32))


@pytest.mark.parametrize(("content", "message"), [
    (index(b"IwFl"), r"a faiss index of the kind IwFl \(inverted lists\). Exact vectors are needed"),
    (index(b"IHNf"), r"the kind IHNf \(a graph, HNSW\)"),
    (index(b"IxPT"), r"the kind IxPT \(transformed vectors\)"),
    (index(b"IxPq"), r"the kind IxPq \(product quantisation\)"),
    (index(b"IzZz"), r"the kind IzZz \(unknown here\)"),
    (b"not vectors", "neither a .npy file nor a faiss index. Exact vectors are needed"),
    (b"", "neither a .npy file nor a faiss index"),
    (index(b"IxFI")[:30], "a faiss index that is cut off"),
    (index(b"IxFI")[:-4], "damaged faiss index: 136 bytes of vectors, expected 140"),
    (index(b"IxFI") + b"more", "144 bytes of vectors, expected 140"),
    (index(b"IxFI", held=36), "7 vectors of 5 numbers are 36 numbers"),
    (index(b"IxF2", VECTORS, metric=1), "compares vectors of different lengths by their distance"),
    (index(b"IxFI", UNIT * np.inf), "vectors that are not finite"),
    (b"\x93NUMPY\x01\x00", "is damaged"),
])
def test_files_that_hold_no_vectors(content, message, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path / "file")
    assert str(tmp_path / "file") in str(error.value)


def test_arrays_of_another_kind(tmp_path):
    for array, message in ((np.zeros(3), r"float64\[3\]"), (np.zeros((2, 2), int), r"int64\[2, 2\]")):
        np.save(tmp_path / "a.npy", array)
        with pytest.raises(ValueError, match=rf"must hold float\[V,E\], but holds {message}"):
            read(tmp_path / "a.npy")


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no vectors at .*none\.npy"):
        read(tmp_path / "none.npy")


def test_settings_that_recall_nothing():
    assert Recall(UNIT, count=7, weight=0.0).sharpness == 20
    with pytest.raises(ValueError, match="count = 8, but must be from 1 to 7.*\n.*weight = 1.5, but must be from 0"):
        Recall(UNIT, count=8, weight=1.5)
    with pytest.raises(ValueError, match="count = 10, but must be from 1 to 7"):
        Recall(UNIT)
    with pytest.raises(ValueError, match=r"must be float\[V,E\], got float32\[5\]"):
        Recall(UNIT[0])
