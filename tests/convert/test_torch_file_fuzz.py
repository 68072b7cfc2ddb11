"""Hostile and damaged files: each ends in WeightFileError or loads as inert data, and nothing in it runs."""

import argparse
import builtins
import copyreg
import functools
import os
import pickle
import random
import resource
import struct
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from mmjax.convert import torch_file
from mmjax.convert.lazy import LazyTensor, WeightFileError

GOLDEN = Path(__file__).parents[1] / "golden/minigpt4/ckpt/minigpt_v2_newer_peft_keys.pth"
SECONDS, MEBIBYTES = 10, 400  # of the processor and of memory, for one file

# What Python itself reports when code from a pickle runs. Hooks cannot be removed, so one is kept and switched.
EXECUTION = {"os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "pickle.find_class", "exec",
             "compile", "import", "shutil.rmtree", "os.remove", "os.mkdir", "socket.connect"}
watching, executed = False, []
sys.addaudithook(lambda event, args: executed.append((event, args)) if watching and event in EXECUTION else None)


def attempt(path):
    """The loaded structure, or the WeightFileError; fails the test if anything was run on the way."""
    global watching
    executed.clear()
    start, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    watching = True
    try:
        result = torch_file.load(path)
        for tensor in leaves(result):
            assert tensor.read().shape == tensor.shape
    except WeightFileError as error:
        assert str(path) in str(error) or path.name in str(error)
        result = error
    finally:
        watching = False
    assert not executed
    assert time.process_time() - start < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < MEBIBYTES * 1024
    return result


def test_the_watch_sees_pickle_at_work(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_file, "load", lambda path: pickle.loads(pickle.dumps(Call(os.getcwd))) and {})
    with pytest.raises(AssertionError):
        attempt(tmp_path)
    assert [event for event, _ in executed] == ["pickle.find_class"]


def leaves(value):
    if isinstance(value, LazyTensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)


def archive(path, program: bytes, storages=()):
    """A well-formed zip around any data.pkl."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", program)
        for key, content in enumerate(storages):
            file.writestr(f"archive/data/{key}", content)
    return path


def refused(path, message=""):
    result = attempt(path)
    assert isinstance(result, WeightFileError), result
    assert message in str(result)


# ------------------------------------------------------------------------------------------------------------- damage


def structure(content: bytes) -> list[range]:
    """Where the zip's own records and the pickle lie."""
    places = [range(content.rindex(b"PK\6\6"), len(content))]
    with zipfile.ZipFile(GOLDEN) as file:
        entries = content.index(b"PK\1\2")
        places.append(range(entries, places[0].start))
        for info in file.infolist():
            name, extra = struct.unpack_from("<2H", content, info.header_offset + 26)
            places.append(range(info.header_offset, info.header_offset + 30 + name + extra))
            if info.filename.endswith("data.pkl"):
                places.append(range(places[-1].stop, places[-1].stop + info.file_size))
    return places


def test_cut_off_anywhere(tmp_path):
    content = GOLDEN.read_bytes()
    edges = {edge for place in structure(content) for edge in (place.start, place.stop)}
    cuts = {cut for edge in edges for cut in (edge - 1, edge, edge + 1)} | set(range(0, len(content), 997))
    cuts |= set(range(len(content) - 120, len(content)))
    assert len(cuts) > 200
    for cut in sorted(cuts & set(range(len(content)))):
        path = tmp_path / "cut.pth"
        path.write_bytes(content[:cut])
        refused(path)
    path.write_bytes(content + b"\0")
    refused(path, "cut off or damaged")


def test_flipped_bytes_of_the_archive(tmp_path):
    content, rng, loaded = GOLDEN.read_bytes(), random.Random(1), 0
    places, path = structure(content), tmp_path / "flipped.pth"
    for _ in range(600):
        changed = bytearray(content)
        for _ in range(rng.choice([1, 1, 1, 4])):
            changed[rng.choice(rng.choice(places))] = rng.randrange(256)
        path.write_bytes(changed)
        loaded += not isinstance(attempt(path), WeightFileError)
    assert 60 < loaded < 450  # checksums, dates and names of tensors do not matter


def test_flipped_bytes_of_tensors_load_as_they_are(tmp_path):
    content = bytearray(GOLDEN.read_bytes())
    whole = [tensor.read().tobytes() for tensor in leaves(torch_file.load(GOLDEN))]
    tensors = list(leaves(torch_file.load(GOLDEN)))
    content[tensors[3].offset] ^= 0xFF
    path = tmp_path / "flipped.pth"
    path.write_bytes(content)
    got = [tensor.read().tobytes() for tensor in leaves(attempt(path))]
    assert [i for i, (one, other) in enumerate(zip(whole, got, strict=True)) if one != other] == [3]


def test_flipped_bytes_of_the_pickle(tmp_path):
    """Many more, on a small program that holds every opcode, through the zip each time."""
    torch_file.save(tmp_path / "a", {"w": np.ones((2, 3), np.float32), "x": [1.5, -1, 2**40, None, True, "s"]})
    with zipfile.ZipFile(tmp_path / "a") as file:
        tensors = file.read("archive/data.pkl")
    programs = [tensors] + [
        pickle.dumps({"a": argparse.Namespace(b=1), "o": OrderedDict(c=(1, 2), d=[3, "4"]), 5: 300}, protocol)
        for protocol in (2, 4)]
    rng, loaded = random.Random(2), 0
    for _ in range(1000):
        program = bytearray(rng.choice(programs))
        for _ in range(rng.choice([1, 1, 1, 3])):
            at = rng.randrange(len(program))
            match rng.randrange(4):
                case 0:
                    program[at] = rng.randrange(256)
                case 1:
                    program[at:at] = rng.choice(list(torch_file.OPCODES))
                case 2:
                    del program[at:at + rng.randrange(1, 9)]
                case 3:
                    program[at:at] = program[rng.randrange(len(program)):][:rng.randrange(20)]
        loaded += not isinstance(attempt(archive(tmp_path / "b.pth", bytes(program), [bytes(24)])), WeightFileError)
    assert 30 < loaded < 500


# ------------------------------------------------------------------------------------------------------------ hostile

MARKER = "mmjax-was-here"


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def call(name: str, *arguments) -> bytes:
    """The opcodes of a call of a function that need not exist here."""
    module, _, function = name.rpartition(".")
    return (b"c" + module.encode() + b"\n" + function.encode() + b"\n(" + b"".join(
        piece if isinstance(piece, bytes) else pickle.dumps(piece, 2)[2:-1] for piece in arguments) + b"tR")


SHELL = f"touch {MARKER}"
WRITE = f"open({MARKER!r}, 'w')"
CALLS = {
    "os.system": Call(os.system, SHELL),
    "eval": Call(eval, WRITE),
    "exec": Call(exec, WRITE),
    "open": Call(open, MARKER, "w"),
    "import": Call(__import__, "antigravity"),
    "popen": Call(subprocess.Popen, ["touch", MARKER]),
    "partial": Call(functools.partial, os.system, SHELL),
    "map": Call(map, os.system, [SHELL]),
    "getattr chain": Call(getattr, Call(getattr, OrderedDict, "__init__"), "__globals__"),
    "reconstructor": Call(copyreg._reconstructor, OrderedDict, object, None),
    "pickle in pickle": Call(pickle.loads, pickle.dumps(Call(os.system, SHELL))),
    "breakpoint": Call(builtins.breakpoint),
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", CALLS)
def test_reduce_of_any_function(tmp_path, monkeypatch, name, protocol):
    monkeypatch.chdir(tmp_path)
    for value in (CALLS[name], {"model": {"w": CALLS[name]}}, [(CALLS[name],)]):
        refused(archive(tmp_path / "a.pth", pickle.dumps(value, protocol)))
    assert os.listdir(tmp_path) == ["a.pth"]


EVIL = call("posix.system", SHELL)
STORAGE = b"(" + b"X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + b"0X\3\0\0\0cpuK\4tQ"
HOOKS = b"ccollections\nOrderedDict\n)R"
PROGRAMS = {
    "posix.system": EVIL,
    "nt.system": call("nt.system", SHELL),
    "torch.load": call("torch.load", "other.pth"),
    "torch.hub": call("torch.hub.load", "a/b", "c"),
    "dotted name": call("torch._utils._rebuild_tensor_v2.__globals__.get", "os"),
    "method of an allowed class": call("collections.OrderedDict.fromkeys", [1]),
    "stack global": b"X\5\0\0\0posixX\6\0\0\0system\x93X\1\0\0\0ltR",
    "stack global of other things": b"K\1]\x93",
    "call inside a tensor": call("torch._utils._rebuild_tensor_v2", STORAGE, 0, (4,), (1,), False, EVIL),
    "call inside hooks of a parameter": call("torch._utils._rebuild_parameter", EVIL, True, HOOKS),
    "call as key": b"}" + EVIL + b"K\1s",
    "storage called": call("torch.FloatStorage", 10**12),
    "storage as tensor": call("torch._utils._rebuild_parameter", STORAGE, False, HOOKS),
    "bare storage": STORAGE,
    "bare class": b"ccollections\nOrderedDict\n",
    "dict with arguments": call("collections.OrderedDict", [(1, 2)]),
    "namespace called": call("argparse.Namespace"),
    "string called": b"X\1\0\0\0a)R",
    "dtype called": b"ctorch\nfloat16\n)R",
    "size of a class": call("torch.Size", b"ctorch\nSize\n"),
    "state of a list": b"]}b",
    "state of a class": b"cargparse\nNamespace\n}b",
    "inst": b"(X\1\0\0\0liposix\nsystem\n",
    "obj": b"(cposix\nsystem\nX\1\0\0\0lo",
    "newobj_ex": b"cposix\nsystem\n)}\x92",
    "newobj": b"cposix\nsystem\nX\1\0\0\0l\x85\x81",
    "ext1": b"\x82\1", "ext2": b"\x83\1\0", "ext4": b"\x84\1\0\0\0",
    "text persistent id": b"Pstorage\n",
    "persistent id: number": b"K\1Q",
    "persistent id: string": b"X\7\0\0\0storageQ",
    "persistent id: path": b"(X\7\0\0\0storagectorch\nFloatStorage\nX\x0b\0\0\0/etc/passwdX\0\0\0\0K\1tQ",
    "persistent id: other class": b"(X\7\0\0\0storageccollections\nOrderedDict\nX\1\0\0\0" + b"0X\0\0\0\0K\4tQ",
    "persistent id: no class": b"(X\7\0\0\0storageX\1\0\0\0aX\1\0\0\0" + b"0X\0\0\0\0K\4tQ",
    "persistent id: negative": b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + b"0X\0\0\0\0J\xff\xff\xff\xfftQ",
    "persistent id: a float": b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + b"0X\0\0\0\0G" + bytes(8) + b"tQ",
    "key: tuple": b"})K\1s", "key: list": b"}]K\1s", "key: float": b"}G" + bytes(8) + b"K\1s", "key: none": b"}NK\1s",
    "empty": b"", "two values": b"NN", "open mark": b"N(", "no mark": b"Nt", "odd items": b"}(Nu", "unset memo": b"h\7",
    "element of a dict": b"}Na", "item of a list": b"]NNs",
    "self reference: list": b"]q\0h\0a", "self reference: dict": b"}q\0K\1h\0s",
    "self reference: over a namespace": b"cargparse\nNamespace\n)\x81q\0}K\1h\0sb",
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_hostile_programs(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    refused(archive(tmp_path / "a.pth", b"\x80\x02" + PROGRAMS[name] + b".", [bytes(16)]))
    assert os.listdir(tmp_path) == ["a.pth"]


def test_the_storage_of_these_programs_is_valid(tmp_path):
    """So that they are refused for what they are meant to show."""
    program = call("torch._utils._rebuild_tensor_v2", STORAGE, 0, (4,), (1,), False, HOOKS)
    assert attempt(archive(tmp_path / "a.pth", b"\x80\x02" + program + b".", [bytes(16)])).shape == (4,)


def test_attributes_never_reach_an_object(tmp_path):
    """Attribute names that mean something to Python are strings in a dict, or dropped."""
    state = pickle.dumps({"__class__": 1, "__dict__": {}, "__setstate__": 2}, 2)[2:-1]
    program = b"\x80\x02}K\1" + HOOKS + state + b"bsK\2cargparse\nNamespace\n)\x81" + state + b"bs."
    assert attempt(archive(tmp_path / "a.pth", program)) == {
        1: {}, 2: {"__class__": 1, "__dict__": {}, "__setstate__": 2}}


# -------------------------------------------------------------------------------------------------------------- bombs

LONG_KEY = b"X\xe8\x03\0\0" + b"k" * 1000
ENDLESS = "contains itself or is far too large"
BOMBS = {
    "nested tuples": (ENDLESS, b")" + b"\x85" * 200_000),
    "nested lists": (ENDLESS, b"]" * 200_000 + b"a" * 199_999),
    "nested namespaces": (ENDLESS, b"}K\1cargparse\nNamespace\nq\0)\x81s" + b"h\0)\x81}K\1" * 30_000 + b"N"
                          + b"sb" * 30_000 + b"\x86"),
    "doubling lists": (ENDLESS, b"(N" + b"".join(b"q%c](h%ch%ce" % (i, i, i) for i in range(40)) + b"t"),
    "doubling tuples": (ENDLESS, b"N" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(40))),
    "doubling dicts": (ENDLESS, b"(N" + b"".join(b"q%c}(K\1h%cK\2h%cu" % (i, i, i) for i in range(40)) + b"t"),
    "long keys": (ENDLESS, b"(N" + b"".join(b"q%c}" % i + LONG_KEY + b"h%cs" % i for i in range(40)) + b"t"),
    "marks": ("does not end with one value", b"(" * 200_000),
    "opcodes": ("more than 1000000 steps", b"}" * 1_100_000),
    "pickle": ("more than the 8388608 that are accepted", b"X" + struct.pack("<I", 9 * 2**20) + b"a" * (9 * 2**20)),
    "memo slot of 4 billion": ("makes no sense", b"Nr\xff\xff\xff\xffj\xfe\xff\xff\xff"),
    "long string in a short file": ("it ends within BINUNICODE", b"X\xff\xff\xff\xff"),
    "long integer in a short file": ("it ends within LONG1", b"\x8a\xff\1"),
    "shape of many axes": ("impossible shape", b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\0("
                           + b"K\1" * 100_000 + b"tq\1h\1\x89NtR"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(tmp_path, name):
    message, program = BOMBS[name]
    refused(archive(tmp_path / "a.pth", b"\x80\x02" + program + b".", [bytes(16)]), message)


# ---------------------------------------------------------------------------------------------------------- hostile zip

ENTRY, SIZES, OFFSET = b"PK\1\2", 20, 42  # of the list of members; where in an entry they are


def patched(path, member: int, at: int, layout: str, *values):
    """Overwrites fields of one entry in the list of members."""
    content = bytearray(path.read_bytes())
    place = content.index(ENTRY)
    for _ in range(member):
        place = content.index(ENTRY, place + 1)
    struct.pack_into(layout, content, place + at, *values)
    path.write_bytes(content)
    return path


@pytest.fixture
def good(tmp_path):
    """Two tensors in members 1 and 2 (0 is data.pkl)."""
    program = b"}" + b"".join(
        b"K" + bytes([i]) + call("torch._utils._rebuild_tensor_v2", STORAGE.replace(b"0X", b"%dX" % i), 0, (4,), (1,),
                                 False, HOOKS) + b"s" for i in (0, 1))
    path = archive(tmp_path / "good.pth", b"\x80\x02" + program + b".", [bytes(16), b"\1" * 16])
    assert attempt(path)[1].read().tobytes() == b"\1" * 16
    return path


def test_compressed_members(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\x80\x02N.")
        file.writestr("archive/data/0", bytes(2**20))
    refused(tmp_path / "a.pth", "compressed")
    refused(patched(tmp_path / "a.pth", 1, SIZES + 4, "<I", 2**30), "compressed")


def test_a_compressed_gibibyte_that_claims_to_be_stored(tmp_path):
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(2**20))
    patched(path, 0, 10, "<H", 0)
    refused(path, "compressed")
    refused(patched(path, 0, SIZES, "<2I", 2**30, 2**30), "overlaps another part")


@pytest.mark.parametrize("member", [0, 1, 2])
def test_sizes_and_offsets_beyond_the_file(good, member):
    content = good.read_bytes()
    for at, layout, values in [(SIZES, "<2I", (2**32 - 2,) * 2), (SIZES, "<2I", (2**32 - 1,) * 2), (SIZES, "<I", (0,)),
                               (SIZES, "<2I", (17, 17)), (OFFSET, "<I", (2**32 - 1,)), (OFFSET, "<I", (len(content),)),
                               (OFFSET, "<I", (len(content) - 4,)), (28, "<3H", (65535,) * 3), (28, "<H", (0,)),
                               (30, "<H", (8,)), (8, "<H", (1,)), (10, "<H", (14,))]:
        refused(patched(good, member, at, layout, *values))
        good.write_bytes(content)


def test_sizes_of_64_bits(good):
    """A zip64 block that sends a member to the end of the world."""
    content = good.read_bytes()
    start = content.index(ENTRY)
    extra = struct.pack("<2H3Q", 1, 24, 2**63, 2**63, 2**64 - 1)
    for block in (extra, extra[:12], struct.pack("<2H", 1, 65535), struct.pack("<2H", 7, 0) * 6):
        changed = bytearray(content)
        name, = struct.unpack_from("<H", content, start + 28)
        struct.pack_into("<2I2H", changed, start + SIZES, 2**32 - 1, 2**32 - 1, name, len(block))
        changed[start + 46 + name:start + 46 + name] = block
        size, = struct.unpack_from("<I", content, len(content) - 10)
        struct.pack_into("<I", changed, len(changed) - 10, size + len(block))
        good.write_bytes(changed)
        refused(good, "data.pkl'")


def test_overlapping_and_repeated_members(good, tmp_path):
    content = good.read_bytes()
    entries = [place for place in range(len(content)) if content.startswith(ENTRY, place)]
    offset, = struct.unpack_from("<I", content, entries[1] + OFFSET)
    refused(patched(good, 2, OFFSET, "<I", offset), "another name in its own header")
    with zipfile.ZipFile(tmp_path / "twice.pth", "w") as file, pytest.warns(UserWarning, match="Duplicate"):
        for text in (b"N", b"K\1"):
            file.writestr("archive/data.pkl", b"\x80\x02" + text + b".")
    refused(tmp_path / "twice.pth", "two members named 'archive/data.pkl'")
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as file:  # data/0 holds a whole member data/1, which is pointed to
        file.writestr("archive/data.pkl", b"\x80\x02N.")
        inner = struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 0, 0, 0, 0, 16, 16, 14, 0) + b"archive/data/1" + bytes(16)
        file.writestr("archive/data/0", inner)
        file.writestr("archive/data/1", bytes(16))
        place = file.getinfo("archive/data/0").header_offset + 30 + 14
    refused(patched(tmp_path / "a.pth", 2, OFFSET, "<I", place), "overlaps another part")


def test_thousands_of_members(good):
    with zipfile.ZipFile(good, "a") as file:
        for i in range(5000):
            file.writestr(f"archive/more/{i}", b"")
    assert list(attempt(good)) == [0, 1]


def test_list_of_members_beyond_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_file, "MAX_HEADER", 1000)
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as file:
        for i in range(20):
            file.writestr(f"archive/{i}", b"")
    refused(tmp_path / "a.pth", "at most 1000 bytes")


def test_end_records_that_lie(good):
    content = good.read_bytes()
    for at, layout, value in [(-22 + 10, "<H", 2), (-22 + 12, "<I", 1), (-22 + 12, "<I", 2**32 - 1),
                              (-22 + 16, "<I", 0), (-22 + 16, "<I", 2**32 - 1), (-22 + 20, "<H", 1)]:
        changed = bytearray(content)
        struct.pack_into(layout, changed, len(content) + at, value)
        good.write_bytes(changed)
        if at != -2:
            refused(good, "cut off or damaged")
    golden = bytearray(GOLDEN.read_bytes())
    for at, value in [(-42 + 8, 2**64 - 1), (-42 + 8, 0), (-98 + 40, 2**63), (-98 + 48, 2**63), (-98 + 32, 2**40)]:
        changed = golden.copy()
        struct.pack_into("<Q", changed, len(golden) + at, value)
        good.write_bytes(changed)
        refused(good, "cut off or damaged")
