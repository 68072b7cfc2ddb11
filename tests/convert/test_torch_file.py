import argparse
import io
import os
import pickle
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.convert import safetensors, torch_file
from mmjax.convert.lazy import LazyTensor, WeightFileError

CKPT = Path(__file__).parents[1] / "golden/minigpt4/ckpt"
ALL_DTYPES = sorted(torch_file.STORAGES.values(), key=str)


def plain(piece) -> bytes:
    """The opcodes for a plain value, to be put into a larger program."""
    return pickle.dumps(piece, 2)[2:-1]


def tensor(key, elements, offset, shape, strides, storage="FloatStorage", extra=b""):
    """The opcodes for a tensor, as torch.save writes them."""
    return (b"ctorch._utils\n_rebuild_tensor_v2\n((" + plain("storage") + b"ctorch\n" + storage.encode() + b"\n"
            + plain(key) + plain("cpu") + plain(elements) + b"tQ" + plain(offset) + plain(shape) + plain(strides)
            + b"\x89ccollections\nOrderedDict\n)R" + extra + b"tR")


def archive(path, program: bytes, storages=(), byteorder=b"little"):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02" + program + b".")
        file.writestr("archive/byteorder", byteorder)
        for key, content in enumerate(storages):
            file.writestr(f"archive/data/{key}", content)
    return path


def read_all(value):
    if isinstance(value, dict):
        return {key: read_all(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(read_all, value))
    return value.read() if isinstance(value, LazyTensor) else value


def assert_same(got, expected):
    assert type(got) is type(expected)
    if isinstance(expected, dict):
        assert list(got) == list(expected)
        for key in expected:
            assert_same(got[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, np.ndarray):
        assert (got.dtype, got.shape, got.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())
        assert got.flags.c_contiguous and got.flags.writeable
    else:
        assert got == expected or got != got


def error(path) -> str:
    with pytest.raises(WeightFileError) as caught:
        torch_file.load(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------------ reading


def test_golden_bin_and_safetensors_folders_hold_the_same_bits():
    pickled, safe = {}, {}
    for path in sorted((CKPT / "llama_hf").glob("*.bin")):
        pickled |= torch_file.load(path)
    for path in sorted((CKPT / "llama_hf_safetensors").glob("*.safetensors")):
        safe |= safetensors.load(path)
    assert len(safe) == 30
    assert set(pickled) - set(safe) == {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(3)}
    assert_same({key: pickled[key].read() for key in safe}, read_all(safe))


def test_golden_training_checkpoint():
    data = torch_file.load(CKPT / "minigpt4_proj.pth")
    assert list(data) == ["model", "optimizer", "config", "scaler", "epoch"]
    weight = data["model"]["llama_proj.weight"]
    assert (weight.shape, weight.dtype, weight.nbytes) == ((64, 48), np.float32, 64 * 48 * 4)
    assert weight.source == "minigpt4_proj.pth: model/llama_proj.weight"
    assert data["epoch"] == 4
    assert isinstance(data["config"]["model"], dict)
    assert set(data["optimizer"]["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    assert data["optimizer"]["state"][0]["exp_avg"].shape == (64, 48)
    assert data["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)


def test_golden_files_are_used_to_the_last_byte():
    """Every storage is read by some tensor, so the sum of the tensors is the sum of the members."""
    for path in sorted(CKPT.glob("*.pth")):
        with zipfile.ZipFile(path) as file:
            stored = sum(info.file_size for info in file.infolist() if "/data/" in info.filename)

        def total(value):
            if isinstance(value, dict | list | tuple):
                return sum(map(total, value.values() if isinstance(value, dict) else value))
            return value.read().nbytes if isinstance(value, LazyTensor) else 0

        assert total(torch_file.load(path)) == stored > 0


def test_views_of_one_storage(tmp_path):
    values = np.arange(24, dtype=np.float32)
    views = {
        "whole": (0, (4, 6), (6, 1), values.reshape(4, 6)),
        "transposed": (0, (6, 4), (1, 6), values.reshape(4, 6).T),
        "offset": (7, (5,), (1,), values[7:12]),
        "columns": (2, (4, 3), (6, 1), values.reshape(4, 6)[:, 2:5]),
        "every second": (1, (4, 3), (6, 2), values.reshape(4, 6)[:, 1::2]),
        "expanded": (3, (2, 5, 3), (0, 0, 1), np.broadcast_to(values[3:6], (2, 5, 3))),
        "one row with an odd stride": (6, (1, 6), (10**30, 1), values[None, 6:12]),
        "scalar": (23, (), (), values[23].reshape(())),
        "nothing": (24, (0, 10**6), (10**30, 1), np.zeros((0, 10**6), np.float32)),
    }
    program = b"}" + b"".join(
        plain(name) + tensor("0", 24, *layout) + b"s" for name, (*layout, _) in views.items())
    got = read_all(torch_file.load(archive(tmp_path / "views.pth", program, [values.tobytes()])))
    assert_same(got, {name: np.ascontiguousarray(view).reshape(view.shape) for name, (*_, view) in views.items()})


def test_what_real_files_hold_beside_tensors(tmp_path):
    """Python's own pickle writes the classes that exist without PyTorch."""
    state = OrderedDict(a=1)
    state._metadata = OrderedDict(version=2)
    data = {"args": argparse.Namespace(lr=1e-3, output_dir="out", seed=None), "state": state,
            "numbers": [True, False, -1, 255, 65535, 2**31, -2**40, 2**63, 1.5, "ü"], "nested": {"a": ({}, [])}, 3: ()}
    expected = data | {"args": vars(data["args"]), "state": {"a": 1}}
    for protocol in (2, 3, 4, 5):
        path = tmp_path / f"{protocol}.pth"
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("x/data.pkl", pickle.dumps(data, protocol))
        assert_same(torch_file.load(path), expected)


def test_parameters_sizes_and_dtypes(tmp_path):
    program = (b"}" + plain("p") + b"ctorch._utils\n_rebuild_parameter\n(" + tensor("0", 2, 0, (2,), (1,))
               + b"\x88ccollections\nOrderedDict\n)RtRs" + plain("size") + b"ctorch\nSize\n(" + plain((2, 3)) + b"tRs"
               + plain("dtype") + b"ctorch\nfloat16\ns")
    got = read_all(torch_file.load(archive(tmp_path / "p.pth", program, [np.float32([1, 2]).tobytes()])))
    assert_same(got, {"p": np.float32([1, 2]), "size": (2, 3), "dtype": "torch.float16"})


def test_memory_is_one_tensor_at_a_time(tmp_path):
    path, size = tmp_path / "large.pth", 4 * 2**20
    torch_file.save(path, {str(i): np.full(size // 4, i, np.float32) for i in range(8)})
    tracemalloc.start()
    tensors = torch_file.load(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    for i in range(8):
        assert tensors[str(i)].read()[-1] == i
    assert tracemalloc.get_traced_memory()[1] < size + 2**20
    tracemalloc.reset_peak()
    torch_file.save(tmp_path / "copy.pth", tensors)
    assert tracemalloc.get_traced_memory()[1] < size + 2**20
    tracemalloc.stop()
    assert (tmp_path / "copy.pth").read_bytes() == path.read_bytes()


def test_tensor_of_a_file_that_shrank_or_went(tmp_path):
    path = tmp_path / "a.pth"
    torch_file.save(path, {"w": np.zeros(1000, np.float32)})
    lazy = torch_file.load(path)["w"]
    os.truncate(path, 1000)
    with pytest.raises(WeightFileError, match=r"a.pth: w: only \d+ of 4000 bytes are left"):
        lazy.read()
    path.unlink()
    with pytest.raises(WeightFileError, match="a.pth: w: cannot read it"):
        lazy.read()


# ------------------------------------------------------------------------------------------------------------- errors

LEGACY = pickle.dumps(0x1950a86a20f9469cfc6c, 2) + pickle.dumps(1001, 2)


@pytest.mark.parametrize(("content", "message"), [
    (b"", "is empty"),
    (b"\n<!DOCTYPE html><html>log in</html>", "is a web page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "git lfs pull"),
    (LEGACY, "before version 1.6.*torch.save\\(torch.load\\('file.pth'"),
    (pickle.dumps({"a": 1}), "bare pickle"),
    (b"\x02\0\0\0\0\0\0\0{}", "is a safetensors file"),
    (b"GGUF\3\0\0\0", "is not a weight file: it begins with b'GGUF"),
    (b"PK\3\4" + bytes(100), "cut off or damaged.*Download it again"),
])  # fmt: skip
def test_files_that_are_something_else(tmp_path, content, message):
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    with pytest.raises(WeightFileError, match=f"(?s){message}"):
        torch_file.load(path)


def test_folders_and_missing_files(tmp_path):
    assert "is a folder" in error(tmp_path)
    assert "no such file" in error(tmp_path / "absent.pth")


def test_zip_that_torch_did_not_write(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as file:
        file.writestr("weights/model.pth", "")
    assert "expected one member NAME/data.pkl, found 0 among ['weights/model.pth']" in error(tmp_path / "a.pth")


def test_big_endian(tmp_path):
    assert "byte order b'big'" in error(archive(tmp_path / "a.pth", b"N", byteorder=b"big"))


def test_object_of_another_library_is_named_with_its_key(tmp_path):
    program = (b"}" + plain("model") + b"}s" + plain("config")
               + b"comegaconf.dictconfig\nDictConfig\n)\x81" + plain({"_content": {}}) + b"bs")
    message = error(archive(tmp_path / "old.pth", program))
    assert "'omegaconf.dictconfig.DictConfig' (near the key 'config')" in message
    assert "torch.save({k: v.detach().clone() for k, v in weights.items()" in message


@pytest.mark.parametrize(("layout", "message"), [
    (("0", 4, 0, (5,), (1,)), "does not fit its storage of 4 elements"),
    (("0", 4, 1, (4,), (1,)), "does not fit"),
    (("0", 4, 0, (2, 2), (3, 1)), "does not fit"),
    (("0", 4, 0, (10**9, 10**9, 10**9), (0, 0, 0)), "repeats the 4 elements"),
    (("0", 4, 0, (0, 10**30), (1, 1)), "repeats the 4 elements"),
    (("0", 4, 5, (0,), (1,)), "does not fit"),
    (("0", 4, -1, (2,), (1,)), "impossible shape"),
    (("0", 4, 0, (-2,), (1,)), "impossible shape"),
    (("0", 4, 0, (2,), (-1,)), "impossible shape"),
    (("0", 4, 0, (2, 2), (1,)), "impossible shape"),
    (("0", 4, 0, ("2",), (1,)), "impossible shape"),
    (("0", 4, 0, (1,) * 33, (1,) * 33), "impossible shape"),
    (("0", 5, 0, (4,), (1,)), "has 16 bytes, expected 5 elements of float32"),
    (("0", 2**70, 0, (4,), (1,)), "has 16 bytes, expected"),
    (("0", 4, 0, (4,), (1,), "HalfStorage"), "has 16 bytes, expected 4 elements of float16"),
    (("7", 4, 0, (4,), (1,)), "member 'archive/data/7' is missing"),
    (("../data.pkl", 4, 0, (4,), (1,)), "is missing"),
    (("0", 4, 0, (4,), (1,), "QInt8Storage"), "made by 'torch.QInt8Storage'"),
    (("0", 4, 0, (4,), (1,), "Size"), "refers to data outside the file"),
    (("0", 4, 0, (4,), (1,), "FloatStorage", plain({"conj": True})), "conjugated or negated"),
])
def test_impossible_tensors(tmp_path, layout, message):
    path = archive(tmp_path / "bad.pth", b"}" + plain("blocks.0.w") + tensor(*layout) + b"s", [bytes(16)])
    assert message in (text := error(path))
    assert "near the key 'blocks.0.w'" in text


# ------------------------------------------------------------------------------------------------------------- saving


def everything():
    rng = np.random.default_rng(0)
    arrays = {str(dtype): rng.integers(0, 2, (3, 5)).astype(dtype) for dtype in ALL_DTYPES}
    return {"model": arrays, "scalar": np.array(3, np.float32), "empty": np.zeros((0, 4), np.float16),
            "transposed": np.arange(6.0).reshape(2, 3).T, "big endian": np.arange(3, dtype=">f4"),
            "epoch": 4, "config": {"lr": 1e-4, "names": ["a", "ü", ""], "betas": (0.9, 0.999), "none": None,
                                   "flags": [True, False], "ints": [0, -1, 2**31, -2**31 - 1, 2**64 - 1]},
            3: {}, "": [[], ()]}


def test_round_trip_of_every_type(tmp_path):
    path, data = tmp_path / "a.pth", everything()
    torch_file.save(path, data)
    data["transposed"] = np.ascontiguousarray(data["transposed"])
    data["big endian"] = data["big endian"].astype("<f4")
    assert_same(read_all(torch_file.load(path)), data)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2**63, 2**64 - 1) | st.floats() | st.text(max_size=5)
    | st.builds(lambda shape, dtype: np.ones(shape, dtype), st.lists(st.integers(0, 3), max_size=3).map(tuple),
                st.sampled_from(ALL_DTYPES)),
    lambda inner: st.lists(inner, max_size=4) | st.lists(inner, max_size=3).map(tuple)
    | st.dictionaries(st.text(max_size=5) | st.integers(-9, 9), inner, max_size=4), max_leaves=10)


@settings(max_examples=60, deadline=None)
@given(data=VALUES)
def test_round_trip_of_any_structure(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("any") / "a.pth"
    torch_file.save(path, data)
    assert_same(read_all(torch_file.load(path)), data)


@pytest.mark.parametrize("limit", [None, 50])
def test_saved_bytes_are_deterministic_and_aligned(tmp_path, monkeypatch, limit):
    """With a lower limit every large member takes the zip64 form that files over 2 GiB have."""
    if limit:
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    for name in "ab":
        torch_file.save(tmp_path / name, everything())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    monkeypatch.undo()
    assert_same(read_all(torch_file.load(tmp_path / "a"))["model"], everything()["model"])
    with open(tmp_path / "a", "rb") as file:
        members = torch_file._members(file, tmp_path / "a")
    assert list(members)[:3] == ["archive/data.pkl", "archive/byteorder", "archive/data/0"]
    assert all(member.offset % 64 == 0 for member in members.values())


def test_a_file_can_be_replaced_by_what_is_read_from_it(tmp_path):
    path = tmp_path / "a.pth"
    torch_file.save(path, {"w": np.arange(5)})
    torch_file.save(path, {"v": torch_file.load(path)["w"]})
    np.testing.assert_array_equal(torch_file.load(path)["v"].read(), np.arange(5))
    assert os.listdir(tmp_path) == ["a.pth"]


def test_values_that_cannot_be_saved_are_all_named(tmp_path):
    with pytest.raises(TypeError) as caught:
        torch_file.save(tmp_path / "a.pth", {"a": [1, {1, 2}], "b": {"c": np.zeros(2, complex), (1, 2): 3}, "d": 2**70})
    for line in ("a/1: set", "b: dict", "d: int"):
        assert line in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.pth"
    torch_file.save(path, {"w": np.arange(5)})
    before, gone = path.read_bytes(), LazyTensor(tmp_path / "gone", "w", np.dtype(np.int8), (1,), (1,), 0)
    with pytest.raises(WeightFileError, match="gone"):
        torch_file.save(path, {"w": gone})
    assert os.listdir(tmp_path) == ["a.pth"] and path.read_bytes() == before


# --------------------------------------------------------------------------------- against PyTorch (pytest -m torch)


def bits(value):
    """A torch tensor as numpy, bfloat16 included."""
    import torch

    if value.dtype == torch.bfloat16:
        return value.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return np.ascontiguousarray(value.detach().numpy()).reshape(tuple(value.shape))


@pytest.mark.torch
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_what_torch_saves(tmp_path, protocol):
    import torch

    base = torch.arange(60.0).reshape(5, 12)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    tensors = {
        "transposed": base.T, "slice": base[1:4, 2:9:3], "expanded": base[0].expand(3, 12), "flip": base.flip(0),
        "permuted": torch.randn(2, 3, 4).permute(2, 0, 1), "scalar": torch.tensor(3), "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(base.clone()), "one": base[2:3], "channels": torch.randn(
            2, 3, 4, 5).to(memory_format=torch.channels_last),
    } | {str(dtype): torch.tensor([0, 1, 1]).to(dtype) for dtype in (
        torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.bool)}
    path = tmp_path / "a.pth"
    torch.save({"tensors": tensors, "net": net.state_dict(), "optimizer": optimizer.state_dict(), "size": base.shape,
                "dtype": torch.float16, "args": argparse.Namespace(lr=1)}, path, pickle_protocol=protocol)
    got = read_all(torch_file.load(path))
    assert_same(got["tensors"], {key: bits(value) for key, value in tensors.items()})
    assert_same(got["net"], {key: bits(value) for key, value in net.state_dict().items()})
    assert_same(got["optimizer"]["state"][0]["exp_avg"], bits(optimizer.state_dict()["state"][0]["exp_avg"]))
    assert (got["size"], got["dtype"], got["args"]) == ((5, 12), "torch.float16", {"lr": 1})


@pytest.mark.torch
@pytest.mark.parametrize("limit", [None, 50])
@pytest.mark.parametrize("how", [{"weights_only": True}, {"weights_only": False},
                                 {"weights_only": True, "mmap": True}])
def test_torch_reads_what_is_saved(tmp_path, monkeypatch, how, limit):
    import torch

    if limit:
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    path, data = tmp_path / "a.pth", everything()
    torch_file.save(path, data)
    monkeypatch.undo()
    got = torch.load(path, **how)
    for key in data["model"]:
        assert_same(bits(got["model"][key]), data["model"][key])
    assert got["empty"].shape == (0, 4) and got["scalar"] == 3
    np.testing.assert_array_equal(got["transposed"].numpy(), data["transposed"])
    assert got["config"] == data["config"] and list(got) == list(data)


@pytest.mark.torch
def test_what_torch_saves_and_is_not_read(tmp_path):
    import torch

    path = tmp_path / "a.pth"
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert "before version 1.6" in error(path)
    for value, name in [(torch.ones(2, dtype=torch.complex64), "torch.ComplexFloatStorage"),
                        (torch.ones(2).to(torch.float8_e5m2), "_rebuild_tensor_v3"),
                        (torch.ones(2).to_sparse(), "_rebuild_sparse_tensor"), (np.float64(1), "scalar"),
                        (torch.device("cpu"), "torch.device"), (torch.nn.Linear(1, 1), "torch.nn.modules.linear")]:
        torch.save({"odd": value}, path)
        assert name in (text := error(path)) and "'odd'" in text
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), buffer)
    path.write_bytes(buffer.getvalue())
    assert "TorchScript" in error(path)
