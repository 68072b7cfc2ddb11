import json
import random
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from mmjax.convert import safetensors as ours
from mmjax.convert.lazy import WeightFileError

CKPT = Path(__file__).parents[1] / "golden/minigpt4/ckpt"


def write(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_every_dtype_the_package_writes(tmp_path):
    tensors = {str(dtype): np.array([[0, 1, 1], [1, 0, 1]]).astype(dtype) for dtype in ours.DTYPES.values()}
    tensors |= {"scalar": np.array(3, np.float32), "empty": np.zeros((0, 4), np.float16)}
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    got = ours.load(tmp_path / "a.safetensors")
    assert set(got) == set(tensors) and got["bfloat16"].dtype == ml_dtypes.bfloat16
    for key, lazy in got.items():
        value = lazy.read()
        assert (value.dtype, value.shape, value.tobytes()) == (
            tensors[key].dtype, tensors[key].shape, tensors[key].tobytes())
        assert lazy.source == f"a.safetensors: {key}"


def test_golden_files_equal_what_the_package_reads():
    for path in (CKPT / "llama_hf_safetensors").glob("*.safetensors"):
        expected, got = safetensors.numpy.load_file(path), ours.load(path)
        assert set(got) == set(expected)
        for key, value in expected.items():
            np.testing.assert_array_equal(got[key].read(), value, strict=True)


@pytest.mark.parametrize(("header", "data", "message"), [
    ({"w": entry(offsets=(0, 4))}, 8, "w: 4 bytes for F32 [2]"),
    ({"w": entry(offsets=(8, 0))}, 8, "w: -8 bytes"),
    ({"w": entry()}, 7, "the tensors take 8 bytes, and 7 follow"),
    ({"w": entry()}, 9, "the tensors take 8 bytes, and 9 follow"),
    ({"w": entry(offsets=(4, 12))}, 12, "w: begins at byte 4 of the data, expected 0"),
    ({"w": entry(offsets=(-8, 0))}, 0, "w: begins at byte -8"),
    ({"a": entry(), "b": entry(offsets=(4, 12))}, 12, "b: begins at byte 4 of the data, expected 8"),
    ({"a": entry(), "b": entry(offsets=(10, 18))}, 18, "b: begins at byte 10 of the data, expected 8"),
    ({"w": entry("F4", (8,))}, 4, "w: dtype F4 is not supported; expected one of BF16, F16"),
    ({"w": entry(shape=(-1, -2))}, 8, "w: expected a dtype, a shape and two data_offsets"),
    ({"w": entry(shape=(2.0,))}, 8, "w: expected a dtype"),
    ({"w": entry(shape=(0, 10**30), offsets=(0, 0))}, 0, "w: expected a dtype"),
    ({"w": entry(shape=(1,) * 33)}, 8, "w: expected a dtype"),
    ({"w": {"dtype": "F32"}}, 8, "w: expected a dtype"),
    ({"w": [1]}, 8, "w: expected a dtype"),
    (b'{"w": 1, "w": 2}', 0, "a name occurs twice"),
    (b'{"w": ', 0, "its header is not readable"),
    (b'{"w": \xff}', 0, "its header is not readable"),
    (b'{"w": ' + b"[" * 100_000, 0, "its header is not readable"),
])
def test_damaged_headers(tmp_path, header, data, message):
    path = write(tmp_path / "a.safetensors", header, bytes(data))
    with pytest.raises(WeightFileError) as caught:
        ours.load(path)
    assert str(path) in str(caught.value) and message in str(caught.value)


def test_all_problems_are_named_at_once(tmp_path):
    path = write(tmp_path / "a.safetensors", {"a": entry("F4"), "b": entry(offsets=(8, 9)), "c": entry()}, bytes(16))
    with pytest.raises(WeightFileError, match="(?s)a: dtype F4.*b: 1 bytes"):
        ours.load(path)


@pytest.mark.parametrize(("content", "message"), [
    (b"", "is empty"),
    (b"PK\3\4" + bytes(40), "is a zip archive, probably a file of torch.save.*Rename it to model.pth"),
    (b"<html><body>401</body></html>", "is a web page"),
    (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    (b"\xff\0\0\0\0\0\0\0{}", "its header would take 255 bytes, of 10 in the file"),
    (b"\0\0\0\x7f\0\0\0\0{}" , "its header would take 2130706432 bytes"),
    (b"\0\0\0\0\0\0\0\x01{}", "is not a weight file"),
    (b"\0" * 8, "is not a weight file"),
])
def test_files_that_are_something_else(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightFileError, match=message):
        ours.load(path)


def test_any_damage_ends_in_the_one_error(tmp_path):
    """Cut anywhere, and with random bytes in the header changed: an error, or tensors that can be read."""
    whole = bytearray((CKPT / "llama_hf_safetensors/model-00002-of-00002.safetensors").read_bytes())
    header = 8 + int.from_bytes(whole[:8], "little")
    path, rng, refused = tmp_path / "a.safetensors", random.Random(0), 0
    for cut in [*range(0, 100), *range(100, header, 50), header, header + 1, len(whole) - 1]:
        path.write_bytes(whole[:cut])
        with pytest.raises(WeightFileError):
            ours.load(path)
    for _ in range(600):
        changed = whole.copy()
        for _ in range(rng.choice([1, 1, 3])):
            changed[rng.randrange(header)] = rng.randrange(256)
        path.write_bytes(changed)
        try:
            for lazy in ours.load(path).values():
                assert lazy.read().shape == lazy.shape
        except WeightFileError:
            refused += 1
    assert 200 < refused < 600  # a changed name is still a valid file
