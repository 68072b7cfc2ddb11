"""Folders that hold more than one set of weights: the set that transformers takes is read, and the rest is named."""

import itertools
import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

from mmjax.convert import meta, state_dict, torch_file, weight_files, write
from mmjax.convert.tables import Problems
from mmjax.convert.weight_files import INDEX, ORDER
from tests.convert.released import IMAGEBIND, described, llama_folder, llama_tensors, meta_folder, params, refused

SAFE, SAFE_INDEX, BIN, BIN_INDEX = ORDER
KEYS = ("model.norm.weight", "lm_head.weight")


def held(value: int) -> dict[str, np.ndarray]:
    return {key: np.full(4, value, np.float32) for key in KEYS}


def save(path, tensors):
    (safetensors.numpy.save_file if path.suffix == ".safetensors" else lambda t, p: torch_file.save(p, t))(
        tensors, path)


def add(folder, name, tensors):
    """One file, or an index and a shard for each tensor."""
    if not name.endswith(INDEX):
        return save(folder / name, tensors)
    stem, suffix = name.removesuffix(INDEX).split(".")
    where = {key: f"{stem}-{n:05}-of-{len(tensors):05}.{suffix}" for n, key in enumerate(tensors, 1)}
    for key, file in where.items():
        save(folder / file, {key: tensors[key]})
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def taken(folder, wanted=KEYS):
    """The value of the set that is read."""
    problems = Problems()
    files, tensors = state_dict.read_folder(folder, problems, wanted)
    assert not problems and files
    (value,) = {float(x) for tensor in tensors.values() for x in tensor.read()}
    return value


def problems_of(folder, wanted=KEYS):
    problems = Problems()
    _, tensors = state_dict.read_folder(folder, problems, wanted)
    assert problems
    return tensors, "\n".join(problems)


@pytest.mark.parametrize("names", [set(names) for size in range(1, 5) for names in itertools.combinations(ORDER, size)],
                         ids=lambda names: " ".join(sorted(names)))
def test_order(tmp_path, capsys, names):
    for name in names:
        add(tmp_path, name, held(ORDER.index(name)))
    first, *rest = sorted(names, key=ORDER.index)
    assert taken(tmp_path) == ORDER.index(first)
    reading, *more = capsys.readouterr().err.splitlines()
    assert reading.startswith(f"{tmp_path}: reading ") and first in reading
    ignoring = [line for line in more if line.startswith(f"{tmp_path}: ignoring ")]
    assert len(ignoring) == bool(rest)
    warnings = [line for line in more if line not in ignoring]
    assert [f"{first} is read, and {name} differs: the values of model.norm.weight" in line
            for name, line in zip(rest, warnings, strict=True)] == [True] * len(rest)
    assert all(name in ignoring[0].split(" As in ")[0].split(": ignoring ")[1] for name in rest)


def test_lines_name_shards_and_all_that_looks_like_weights(tmp_path, capsys):
    add(tmp_path, SAFE_INDEX, held(1))
    for name in ("model.fp16.safetensors", "pytorch_model.bin.part", "model\n\x1b.gguf", "README.md", "tokenizer.model",
                 *(f"pytorch_model-{n:05}-of-00003.bin" for n in (1, 2, 3))):
        (tmp_path / name).touch()
    assert taken(tmp_path) == 1
    reading, ignoring = capsys.readouterr().err.splitlines()
    assert reading.endswith("reading model-*-of-00002.safetensors (2 files), model.safetensors.index.json.")
    names, why = ignoring.split(": ignoring ")[1].split(". ", 1)
    assert set(names.split(", ")) == {
        "model??.gguf", "model.fp16.safetensors", "pytorch_model-*-of-00003.bin (3 files)", "pytorch_model.bin.part"}
    assert why.startswith("As in transformers, model.safetensors.index.json is read")


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def dangle(path):
    path.unlink()
    path.symlink_to("../blobs/0123")


def turn_into_a_folder(path):
    path.unlink()
    path.mkdir()


def leave_to_aria2(path):
    path.with_name(path.name + ".aria2").touch()


DAMAGE = {
    cut: "Download it again", dangle: "is a link to ../blobs/0123, which does not exist",
    turn_into_a_folder: "is a folder", leave_to_aria2: "aria2 deletes at the end of the download",
    lambda path: path.write_bytes(b""): "is empty",
    lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"): "git-lfs pointer",
}


@pytest.mark.parametrize("first, older", [(SAFE, SAFE_INDEX), (SAFE, BIN), (BIN, BIN_INDEX), (SAFE_INDEX, BIN_INDEX)])
@pytest.mark.parametrize("damage, said", DAMAGE.items(), ids=range(len(DAMAGE)))
def test_a_damaged_set_is_never_replaced_by_an_older_one(tmp_path, damage, said, first, older):
    add(tmp_path, first, held(1))
    add(tmp_path, older, held(2))
    damage(tmp_path / first.replace(SAFE_INDEX, "model-00002-of-00002.safetensors"))
    tensors, message = problems_of(tmp_path)
    assert not tensors and said in message
    assert f"also holds a complete set: {older}. If it is the one you want, delete {first}, or" in message
    path = tmp_path / first
    path.rmdir() if path.is_dir() else path.unlink()
    assert taken(tmp_path) == 2  # the advice is true


def test_an_index_without_its_shards(tmp_path):
    add(tmp_path, SAFE_INDEX, held(1))
    for path in tmp_path.glob("model-*.safetensors"):
        path.unlink()
    assert "model-00001-of-00002.safetensors, model-00002-of-00002.safetensors are missing" in problems_of(tmp_path)[1]
    add(tmp_path, BIN_INDEX, held(2))
    assert f"also holds a complete set: {BIN_INDEX}. If it is the one you want, delete {SAFE_INDEX}, or" in problems_of(
        tmp_path)[1]
    add(tmp_path, BIN, held(3))
    cut(tmp_path / BIN)
    assert f"complete set: {BIN_INDEX}. If it is the one you want, delete {SAFE_INDEX} and {BIN}" in problems_of(
        tmp_path)[1]
    cut(tmp_path / "pytorch_model-00001-of-00002.bin")
    assert "complete set" not in problems_of(tmp_path)[1]
    add(tmp_path, SAFE, held(4))
    assert taken(tmp_path) == 4


def test_a_set_that_lacks_tensors(tmp_path):
    """As a sharded training leaves it: a small file of the first order beside the whole model."""
    add(tmp_path, SAFE, {KEYS[0]: np.ones(4, np.float32)})
    add(tmp_path, BIN, {KEYS[1]: np.ones(4, np.float32)})
    assert taken(tmp_path, KEYS[:1]) == 1
    problems = Problems()
    state_dict.read_folder(tmp_path, problems, KEYS)
    assert not problems  # no other set is complete either; what is missing is said where the model is filled
    add(tmp_path, BIN, held(2))
    assert f"also holds a complete set: {BIN}. If it is the one you want, delete {SAFE}, or" in problems_of(tmp_path)[1]


@pytest.mark.parametrize("name", ["../a.bin", "/a.bin", "sub/a.bin", "", ".", "..", "a.bin/", "..\\a.bin", "a\0.bin", 5,
                                  None, ["a.bin"]])
def test_an_index_names_files_of_its_own_folder(tmp_path, name):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path, folder, folder / "sub"):
        save(place / "a.bin", held(1))
    index = folder / BIN_INDEX
    index.write_text(json.dumps({"weight_map": {KEYS[0]: "a.bin", KEYS[1]: name}}))
    assert "names files of its own folder: lm_head.weight is said to be in" in problems_of(folder)[1]
    index.write_text(json.dumps({"weight_map": dict.fromkeys(KEYS, "a.bin")}))
    assert taken(folder) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": ["a"]}',
                                  '{"weight_map": "a"}', "[" * 100_000])
def test_an_index_that_says_nothing(tmp_path, text):
    (tmp_path / SAFE_INDEX).write_text(text)
    assert problems_of(tmp_path)[1].count("\n") == 0


def test_no_set(tmp_path):
    assert problems_of(tmp_path)[1].endswith("is there.")
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "consolidated.00.pth"):
        (tmp_path / name).touch()
    message = problems_of(tmp_path)[1]
    assert "It holds consolidated.00.pth, model-*-of-00002.safetensors (2 files), which" in message
    assert "Shards are read through their index" in message and "give a folder without config.json" in message
    assert "none of" in problems_of(tmp_path / "consolidated.00.pth")[1]  # a file


def test_a_set_that_config_names(tmp_path, capsys):
    add(tmp_path, SAFE, held(1))
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"transformers_weights": "other.safetensors"}))
    assert "other.safetensors is missing, though config.json names it" in problems_of(tmp_path)[1]
    add(tmp_path, "other.safetensors", held(2))
    assert taken(tmp_path) == 2
    assert "ignoring model.safetensors. config.json names other.safetensors" in capsys.readouterr().err
    for name in ("../model.safetensors", "model.bin", 3):
        config.write_text(json.dumps({"transformers_weights": name}))
        assert f"transformers_weights is {name!r}; expected the name" in problems_of(tmp_path)[1]


def test_a_new_file_beside_an_older_model_in_shards(tmp_path, capsys):
    """The whole way: the new one is converted, its card names it alone, and a delta's folder is chosen from alike."""
    new = llama_tensors()
    folder = llama_folder(tmp_path / "llama", new)
    (folder / BIN).unlink()
    add(folder, BIN_INDEX, {key: 2 * value for key, value in new.items()})
    add(folder, SAFE, new)
    delta = tmp_path / "delta"
    delta.mkdir()
    for name, share in ((SAFE, 0.01), (BIN, 0.02)):
        add(delta, name, {key: (share * value).astype(value.dtype) for key, value in new.items()})
    write.command("llama")(folder, tmp_path / "out")
    scale = params(tmp_path / "out")["llm/norm/scale"]
    np.testing.assert_array_equal(scale, new["model.norm.weight"])
    assert [source["file"] for source in described(tmp_path / "out")["sources"]["llm"]] == [SAFE]
    write.command("llama")(folder, tmp_path / "sum", delta=delta)
    np.testing.assert_allclose(params(tmp_path / "sum")["llm/norm/scale"], scale * 1.01, rtol=2e-3)
    lines = capsys.readouterr().err
    assert f"{delta}: reading {SAFE}.\n{delta}: ignoring {BIN}." in lines
    cut(folder / SAFE)
    shutil.rmtree(tmp_path / "out")
    assert f"{folder} also holds a complete set: {BIN_INDEX}" in refused(tmp_path, write.command("llama"), llm=folder)


def test_metas_files_beside_those_of_transformers(tmp_path, capsys):
    one = IMAGEBIND / "llama_meta"
    folder = meta_folder(tmp_path / "meta", one)
    (folder / SAFE).touch()
    write.command("llama")(folder, tmp_path / "out")
    lines = capsys.readouterr().err.splitlines()
    assert f"{folder}: reading consolidated.00.pth." in lines
    assert f"{folder}: ignoring {SAFE}. A folder without config.json is read as Meta ships it." in lines

    both = llama_folder(tmp_path / "both", llama_tensors())
    for file in one.iterdir():
        shutil.copyfile(file, both / file.name)
    write.command("llama")(both, tmp_path / "out", overwrite=True)
    (ignoring,) = [line for line in capsys.readouterr().err.splitlines() if "ignoring" in line]
    assert ignoring.startswith(f"{both}: ignoring consolidated.00.pth. ") and "folder without config.json" in ignoring
    (both / BIN).unlink()
    shutil.rmtree(tmp_path / "out")
    assert "give a folder without config.json" in refused(tmp_path, write.command("llama"), llm=both)
    (both / "config.json").unlink()
    write.command("llama")(both, tmp_path / "out")  # the advice is true


@pytest.mark.parametrize("name, said", [
    ("consolidated.0.pth", "has shard 0 twice: consolidated.0.pth and consolidated.00.pth"),
    ("consolidated.000.pth", "has shard 0 twice: consolidated.00.pth and consolidated.000.pth"),
    (f"consolidated.{10**60}.pth", "but not consolidated.01.pth, consolidated.02.pth"),
    ("consolidated.00.pth.aria2", "consolidated.00.pth is not complete")])
def test_metas_shards_that_are_no_set(tmp_path, name, said):
    shutil.copytree(IMAGEBIND / "llama_meta", tmp_path / "meta")
    (tmp_path / "meta" / name).touch()
    problems = Problems()
    assert meta.read_shards(tmp_path / "meta", problems) == {}
    assert len(problems) == 1 and said in problems[0] and len(problems[0]) < 3_000


def test_metas_files_under_other_names(tmp_path):
    for name in ("consolidated.pth", "consolidated.00.bin"):
        (tmp_path / name).touch()
    problems = Problems()
    meta.read_shards(tmp_path, problems)
    assert "it holds consolidated.00.bin, consolidated.pth, which cannot be read" in problems[0]


def test_listed():
    assert weight_files.listed(["b.bin", "consolidated.01.pth", "a-00001-of-00001.bin", "consolidated.00.pth"]) == (
        "a-00001-of-00001.bin, b.bin, consolidated.*.pth (2 files)")
