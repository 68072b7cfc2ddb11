"""Arrays from files whose headers claim anything."""

import io
import zipfile

import numpy as np
import pytest

from benchmarks.hostile import npy, npz
from mmjax.data.arrays import DEFLATED, UNPACKED, read_npy, read_npz

RANDOM = np.random.default_rng(0)
ARRAYS = (RANDOM.normal(size=(3, 4)), np.asfortranarray(RANDOM.normal(size=(3, 4, 2))), np.float32(3), np.zeros((0, 4)),
          np.array(["ab", "c"]), np.array([b"x"]), np.array([True]), RANDOM.normal(size=5).astype(">f8"),
          np.array([1 + 2j]), np.zeros(3, np.float16))


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype}{list(array.shape)}")
@pytest.mark.parametrize("mmap", [False, True])
def test_arrays_are_as_numpy_reads_them(array, mmap, tmp_path):
    np.save(tmp_path / "a.npy", array)
    found, expected = read_npy(tmp_path / "a.npy", mmap), np.load(tmp_path / "a.npy")
    assert (found.dtype, found.shape, found.flags.f_contiguous) == (
        expected.dtype, expected.shape, expected.flags.f_contiguous)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("descr", "shape"), [("'<f4'", "(2,)"), ('"<f4"', "(2L,)"), ("'f4'", "( 2 )")])
def test_headers_of_other_writers(descr, shape, tmp_path):
    (tmp_path / "a.npy").write_bytes(npy(descr, shape))
    np.testing.assert_array_equal(read_npy(tmp_path / "a.npy"), np.zeros(2, np.float32))


@pytest.mark.parametrize(
    ("descr", "shape", "message"),
    [
        (
            "'<f4'",
            "(1000000, 1000000)",
            r"float32\[1000000, 1000000\], which takes 4,000,000,000,000 bytes, but there are 64",
        ),
        ("'<f4'", "(17,)", r"float32\[17\], which takes 68 bytes, but there are 64"),
        ("'<f8'", f"({10**20}, 1)", "which takes 8"),
        ("'<f8'", f"({10**2000},)", "which takes far too many bytes"),
        ("'<f4'", "(" + "9" * 5000 + ",)", "cannot be read"),
        ("'<f4'", "(-1, 4)", r"names the shape \[-1, 4\]"),
        ("'<f4'", f"(0, {2**62}, 4)", r"names the shape \[0, "),
        ("'<f4'", "(" + "1," * 33 + ")", "names the shape"),
        ("'<f4'", "(1-1,)", "cannot be read"),
        ("'<f8'", "(True, 4)", "not that of an array of plain numbers"),
        ("'|O'", "(2,)", r"holds \|O, but only plain"),
        ("'<M8[ns]'", "(2,)", "only plain numbers and text"),
        ("'|V0'", "(2,)", "only plain numbers"),
        ("'|S0'", "(2,)", "only plain numbers"),
        ("'f4,f4'", "(2,)", "only plain"),
        ("'(2,)f4'", "(2,)", "only plain"),
        ("'<f3'", "(2,)", "cannot be read"),
        ("[('a', '<f4')]", "(2,)", "not that of an array of plain numbers"),
        ("(" * 50, "(2,)", "not that of an array"),
    ],
)
def test_claims_that_are_refused(descr, shape, message, tmp_path):
    (tmp_path / "a.npy").write_bytes(npy(descr, shape) if len(shape) < 100 else long_header(descr, shape))
    with pytest.raises(ValueError, match=message) as error:
        read_npy(tmp_path / "a.npy")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.write(tmp_path / "a.npy", "x.npy")
    with pytest.raises(ValueError, match="x.npy: .*" + message):
        read_npz(tmp_path / "a.npz")


def long_header(descr, shape):
    head = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".encode()
    return b"\x93NUMPY\x02\x00" + len(head).to_bytes(4, "little") + head + bytes(64)


def test_files_that_end_in_their_header(tmp_path):
    whole = npy("'<f4'", "(2,)")
    for length in (*range(0, 12), 60, 126):
        (tmp_path / "a.npy").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="does not begin as|not that of an array|takes 8 bytes, but there are 0"):
            read_npy(tmp_path / "a.npy")
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x02\x00" + b"\xff" * 40)
    with pytest.raises(ValueError, match="header takes 4,294,967,295 bytes"):
        read_npy(tmp_path / "a.npy")
    for place in (tmp_path, tmp_path / "none.npy"):
        with pytest.raises(FileNotFoundError):
            read_npy(place)


def test_archives(tmp_path):
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", **{f"x{number}": array for number, array in enumerate(ARRAYS)})
        for number, (name, found) in enumerate(read_npz(tmp_path / "a.npz").items()):
            assert (name, found.dtype, found.shape) == (f"x{number}", ARRAYS[number].dtype, ARRAYS[number].shape)
            np.testing.assert_array_equal(found, ARRAYS[number])


def test_archives_that_are_refused(tmp_path):
    bomb = npz(2, UNPACKED // 2)
    with pytest.raises(ValueError, match=f"its {len(bomb):,} bytes would unpack to 67,109,120.*numpy.savez"):
        read_npz(io.BytesIO(bomb))
    assert read_npz(io.BytesIO(bomb), DEFLATED)["x1"].nbytes == UNPACKED // 2
    for name, kind, message in (("a.txt", zipfile.ZIP_STORED, "a.txt, which is not an array"),
                                ("a.npy", zipfile.ZIP_LZMA, "a way that numpy does not write")):
        with zipfile.ZipFile(tmp_path / "a.npz", "w", kind) as archive:
            archive.writestr(name, npy("'<f4'", "(2,)"))
        with pytest.raises(ValueError, match=message):
            read_npz(tmp_path / "a.npz")
    (tmp_path / "a.npz").write_bytes(b"no")
    with pytest.raises(ValueError, match="not a readable archive of arrays"):
        read_npz(tmp_path / "a.npz")
