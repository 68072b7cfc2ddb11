"""Reads and writes files of torch.save (`.pth`, `.bin`) without PyTorch; `load` runs no code from the file.

Such a file is an uncompressed zip archive: `NAME/data.pkl` is a pickle that describes the structure, and the numbers
of each storage are a member `NAME/data/KEY`. A pickle is a program that may call any Python function, and these files
come from the internet, so `pickle.Unpickler` is not used. Even with a restricted `find_class` it calls what that
returns, sets attributes, hashes any key (nested tuples overflow the C stack) and allocates memory as the file demands
(a memo slot of 4 billion). Instead, `_Reader` below interprets only the opcodes that torch.save writes: it builds
dicts, lists, tuples, strings and numbers, knows a fixed set of names, and raises an error for anything else. No step
copies a value, so work and memory are bounded by the number of opcodes, which is bounded too.

Left out, with an error that says so: the format before PyTorch 1.6, TorchScript, quantised and sparse tensors, and all
Python objects but `argparse.Namespace` (training scripts store their arguments in one). Objects in members that the
caller does not want (`unwanted`) are dropped: they are never made, only their names are read.
"""

import dataclasses
import math
import os
import struct
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from mmjax.convert.lazy import MAX_AXES, MAX_HEADER, LazyTensor, WeightFileError, contiguous, kind, span

STORAGES = {
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "HalfStorage": np.dtype(np.float16),
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
READ_STORAGES = STORAGES | {  # read so that they can be named; no parameter has such a dtype
    "ComplexFloatStorage": np.dtype(np.complex64), "ComplexDoubleStorage": np.dtype(np.complex128)}
UNTYPED = "torch.storage.UntypedStorage"  # of tensors that `_rebuild_tensor_v3` builds
V3_DTYPES = {f"torch.{name}": np.dtype(getattr(ml_dtypes, name, None) or name) for name in (
    "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "uint16", "uint32", "uint64")}
DTYPES = {f"torch.{dtype.name}" for dtype in READ_STORAGES.values()} | V3_DTYPES.keys()
NAMES = {"collections.OrderedDict", "argparse.Namespace", "torch.Size", "torch._utils._rebuild_tensor_v2",
         "torch._utils._rebuild_tensor_v3", "torch._utils._rebuild_parameter",
         "torch._utils._rebuild_parameter_with_state", UNTYPED} | {f"torch.{name}" for name in READ_STORAGES}

# A tensor takes about 15 opcodes and 150 bytes: room for 60,000 of them.
MAX_OPCODES = 1_000_000
MAX_VALUES = 250_000
MAX_DEPTH = 100  # configs nest some ten deep; more would overflow recursive functions on the result
MAX_KEY = 1_000  # characters from the top to a tensor
MAX_EXPANDED = 64 * 2**20  # bytes of a tensor that repeats elements (`expand`) and is small in the file


def load(path: str | os.PathLike, unwanted: Collection[str] = ()) -> Any:
    """Returns the structure that was saved with torch.save, with a LazyTensor for every tensor.

    Dicts of any kind and `argparse.Namespace` are returned as dict, parameters as tensors, dtypes as strings such as
    "torch.float16". Attributes of dicts (PyTorch's `_metadata`) and of tensors are dropped. Raises WeightFileError.

    unwanted: members of the dict at the top that are returned as None, whatever objects they hold
    """
    path = Path(path)
    found = kind(path)
    if found == "safetensors":
        raise WeightFileError(f"{path} is a safetensors file, whatever its name says. Rename it to "
                              f"{path.with_suffix('.safetensors').name} and pass that.")
    if found != "zip":
        raise WeightFileError(f"{path} {found}")
    with open(path, "rb") as file:
        members = _members(file, path)
        pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise WeightFileError(f"{path} is a zip archive, but not one written by torch.save: expected one member "
                                  f"NAME/data.pkl, found {len(pickles)} among {list(members)[:4]}. If it is an archive "
                                  "around the weights, unpack it and pass the file inside.")
        root = pickles[0].removesuffix("data.pkl")
        order = _content(file, path, members, root + "byteorder") if root + "byteorder" in members else b"little"
        if order != b"little":
            raise WeightFileError(f"{path} has byte order {order[:16]!r}; expected b'little'. Save it again on a "
                                  "little-endian machine: torch.save(torch.load(f), g).")
        program = _content(file, path, members, pickles[0])
    return _Reader(path, members, root, unwanted).run(program)


# ---------------------------------------------------------------------------------------------------------------- zip


class _Member(NamedTuple):
    offset: int  # of its content in the file
    size: int


def _broken(path: Path, what: str) -> WeightFileError:
    return WeightFileError(f"{path} is cut off or damaged: {what}.\n"
                           "Download it again, and compare its size with the one the site states.")


def _content(file: BinaryIO, path: Path, members: dict[str, _Member], name: str) -> bytes:
    offset, size = members[name]
    if size > MAX_HEADER:
        raise WeightFileError(f"{path}: {name} has {size} bytes, more than the {MAX_HEADER} that are accepted. It "
                              "describes the tensors and should be small; save the tensors alone with torch.save.")
    file.seek(offset)
    return file.read(size)


def _members(file: BinaryIO, path: Path) -> dict[str, _Member]:
    """Returns the position of each member. zipfile is not used: it trusts sizes, and gives no offset of the content.

    Checks that everything is inside the file, nothing overlaps, no name occurs twice, and nothing is compressed (so no
    member is larger than the file).
    """
    length = file.seek(0, os.SEEK_END)

    def read(what: str, magic: bytes, layout: str, offset: int) -> tuple[int, ...]:
        size = struct.calcsize(layout)
        if not 0 <= offset <= length - size:
            raise _broken(path, f"the {what} would be at byte {offset} of {length}")
        file.seek(offset)
        got, *fields = struct.unpack(layout, file.read(size))
        if got != magic:
            raise _broken(path, f"there is no {what} at byte {offset} of {length}")
        return tuple(fields)

    end = length - 22
    _, _, _, count, size, start, _ = read("end record of the zip archive", b"PK\5\6", "<4s4H2IH", end)
    file.seek(max(end - 20, 0))
    if file.read(4) == b"PK\6\7":
        _, end, _ = read("zip64 locator", b"PK\6\7", "<4sIQI", end - 20)
        *_, count, size, start = read("zip64 end record", b"PK\6\6", "<4sQ2H2I4Q", end)
    if start + size != end or size > MAX_HEADER:
        raise _broken(path, f"its list of {count} members claims bytes {start} to {start + size}, expected an end at "
                            f"{end} and at most {MAX_HEADER} bytes")

    members, extents, at = {}, [], start
    while at < end:
        (_, _, flags, method, _, _, _, packed, size, name_length, extra_length, comment_length, _, _, _,
         local) = read("entry in its list of members", b"PK\1\2", "<4s6H3I5H2I", at)
        tail = file.read(name_length + extra_length + comment_length)
        name = tail[:name_length].decode("utf-8", "replace")
        size, packed, local = _wide(tail[name_length:name_length + extra_length], size, packed, local)
        *_, local_name, local_extra = read(f"header of member {name!r}", b"PK\3\4", "<4s5H3I2H", local)
        if flags & 1 or method != 0 or packed != size:
            raise WeightFileError(
                f"{path}: member {name!r} is compressed or encrypted, which torch.save never does.\nIf this is a "
                "TorchScript program (torch.jit.save), save its weights instead: torch.save(torch.jit.load(f)"
                ".state_dict(), g). If it was packed again with another program, unpack it and pack it with `zip -0`.")
        if file.read(local_name) != tail[:name_length]:
            raise _broken(path, f"member {name!r} has another name in its own header")
        if name in members:
            raise _broken(path, f"it has two members named {name!r}")
        members[name] = _Member(local + 30 + local_name + local_extra, size)
        extents.append((local, members[name].offset + size, name))
        at += 46 + len(tail)
    if len(members) != count or at != end:
        raise _broken(path, f"its end record promises {count} members, and there are {len(members)}")
    free = 0
    for first, last, name in sorted(extents):
        if first < free or last > start:
            raise _broken(path, f"member {name!r} at bytes {first} to {last} overlaps another part of the file")
        free = last
    return members


def _wide(extra: bytes, *fields: int) -> list[int]:
    """Returns the fields; those too large for 32 bits are read from the zip64 block of an entry's extra bytes."""
    wide: list[int] = []
    at = 0
    while at + 4 <= len(extra):
        block, size = struct.unpack_from("<2H", extra, at)
        if block == 1:
            count = min(size, len(extra) - at - 4) // 8
            wide = list(struct.unpack_from(f"<{count}Q", extra, at + 4))
        at += 4 + size
    return [wide.pop(0) if field == 0xFFFFFFFF and wide else field for field in fields]


# ------------------------------------------------------------------------------------------------------------- pickle


# The opcodes of pickle protocols 2 to 5 that torch.save writes, with the layout of their argument or of its length.
OPCODES = {
    b"\x80": ("PROTO", "<B"), b"\x95": ("FRAME", "<Q"), b".": ("STOP", ""),
    b"N": ("NONE", ""), b"\x88": ("NEWTRUE", ""), b"\x89": ("NEWFALSE", ""),
    b"J": ("BININT", "<i"), b"K": ("BININT1", "<B"), b"M": ("BININT2", "<H"), b"G": ("BINFLOAT", ">d"),
    b"\x8a": ("LONG1", "<B"), b"X": ("BINUNICODE", "<I"), b"\x8c": ("SHORT_BINUNICODE", "<B"),
    b"(": ("MARK", ""), b")": ("EMPTY_TUPLE", ""), b"t": ("TUPLE", ""),
    b"\x85": ("TUPLE1", ""), b"\x86": ("TUPLE2", ""), b"\x87": ("TUPLE3", ""),
    b"}": ("EMPTY_DICT", ""), b"s": ("SETITEM", ""), b"u": ("SETITEMS", ""),
    b"]": ("EMPTY_LIST", ""), b"a": ("APPEND", ""), b"e": ("APPENDS", ""),
    b"q": ("BINPUT", "<B"), b"r": ("LONG_BINPUT", "<I"), b"\x94": ("MEMOIZE", ""),
    b"h": ("BINGET", "<B"), b"j": ("LONG_BINGET", "<I"),
    b"c": ("GLOBAL", ""), b"\x93": ("STACK_GLOBAL", ""), b"R": ("REDUCE", ""), b"\x81": ("NEWOBJ", ""),
    b"b": ("BUILD", ""), b"Q": ("BINPERSID", ""),
}  # fmt: skip


def _opcodes(program: bytes) -> Iterator[tuple[str, Any]]:
    """Yields the name and argument of each opcode up to STOP.

    `pickletools.genops` is not used because it warns about invalid escapes in names.
    Raises ValueError with the position of the first invalid byte.
    """
    at, name = 0, ""
    while name != "STOP":
        if (code := program[at:at + 1]) not in OPCODES:
            raise ValueError(f"byte {at} is {code!r}, no opcode that torch.save writes")
        name, layout = OPCODES[code]
        at += 1
        argument = None
        if layout:
            if at + struct.calcsize(layout) > len(program):
                raise ValueError(f"it ends within {name} at byte {at - 1}")
            argument, = struct.unpack_from(layout, program, at)
            at += struct.calcsize(layout)
        if name == "GLOBAL":
            middle = program.index(b"\n", at)
            end = program.index(b"\n", middle + 1)
            argument = f"{program[at:middle].decode('utf-8')}.{program[middle + 1:end].decode('utf-8')}"
            at = end + 1
        elif name in ("LONG1", "BINUNICODE", "SHORT_BINUNICODE"):
            content = program[at:at + argument]
            if len(content) < argument:
                raise ValueError(f"it ends within {name} at byte {at}")
            at += argument
            argument = (int.from_bytes(content, "little", signed=True) if name == "LONG1"
                        else content.decode("utf-8", "surrogatepass"))
        yield name, argument


@dataclasses.dataclass(frozen=True)
class _Name:
    """The name of a class or function that the pickle refers to."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    size: int  # elements
    offset: int  # bytes


@dataclasses.dataclass
class _Namespace:
    attributes: dict


@dataclasses.dataclass(frozen=True)
class _Object:
    """Stands for an object of a class that is not read; refused unless it is in an unwanted member."""

    name: str
    where: str


class _Reader:
    """Interprets one data.pkl. Values are dict, list, tuple, str, int, float, bool, None and the classes above."""

    def __init__(self, path: Path, members: dict[str, _Member], root: str, unwanted: Collection[str] = ()):
        self.path, self.members, self.root, self.unwanted = path, members, root, unwanted
        self.frames: list[list[Any]] = [[]]  # a MARK opens a frame, the opcode that consumes it closes it
        self.memo: dict[int, Any] = {}
        self.values = 0

    def run(self, program: bytes) -> Any:
        try:
            for count, (opcode, argument) in enumerate(_opcodes(program)):
                if count == MAX_OPCODES:
                    raise self.refuse(f"has more than {MAX_OPCODES} steps in its data.pkl, far beyond any model")
                self.step(opcode, argument)
        except WeightFileError:
            raise
        except (ValueError, IndexError, KeyError) as error:  # bad bytes, an empty stack, an unset memo slot
            raise _broken(self.path, f"its data.pkl makes no sense{self.where()}: {type(error).__name__} {error}"
                          ) from error
        if len(self.frames) != 1 or len(self.frames[0]) != 1:
            raise _broken(self.path, "data.pkl does not end with one value")
        return self.finish(self.frames[0][0], "", 0)

    def step(self, opcode: str, argument: Any) -> None:
        """Executes one opcode. The names are pickle's; see `pickletools` for their meaning."""
        stack = self.frames[-1]
        match opcode:
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "NONE":
                stack.append(None)
            case "NEWTRUE":
                stack.append(True)
            case "NEWFALSE":
                stack.append(False)
            case "MARK":
                self.frames.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode[-1])
                stack.append(tuple(self.pop(count)))
            case "TUPLE":
                frame = self.close()
                self.frames[-1].append(tuple(frame))
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                self.assign(self.pop(2))
            case "SETITEMS":
                self.assign(self.close())
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND":
                self.extend(self.pop(1))
            case "APPENDS":
                self.extend(self.close())
            case "GLOBAL":
                stack.append(self.lookup(argument))
            case "STACK_GLOBAL":
                module, name = self.pop(2)
                if not isinstance(module, str) or not isinstance(name, str):
                    raise ValueError("a class whose name is no string")
                stack.append(self.lookup(f"{module[:MAX_KEY]}.{name[:MAX_KEY]}"))
            case "REDUCE" | "NEWOBJ":
                function, arguments = self.pop(2)
                stack.append(self.call(opcode, function, arguments))
            case "BUILD":
                self.build(*self.pop(2))
            case "BINPERSID":
                stack.append(self.storage(stack.pop()))

    def pop(self, count: int) -> list[Any]:
        stack = self.frames[-1]
        if len(stack) < count:
            raise IndexError("too few values")
        taken = stack[-count:]
        del stack[-count:]
        return taken

    def close(self) -> list[Any]:
        if len(self.frames) == 1:
            raise IndexError("no mark")
        return self.frames.pop()

    def assign(self, items: list[Any]) -> None:
        target = self.frames[-1][-1]
        if isinstance(target, _Object):
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError("items for something that is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # No other keys occur, and hashing other values can take arbitrarily long.
            if not isinstance(key, str) and not (isinstance(key, int) and abs(key) < 2**63):
                raise self.refuse(f"has a dict with a key of type {type(key).__name__}; expected strings or integers")
            target[key] = value

    def extend(self, items: list[Any]) -> None:
        target = self.frames[-1][-1]
        if isinstance(target, _Object):
            return
        if not isinstance(target, list):
            raise ValueError("elements for something that is no list")
        target.extend(items)

    def lookup(self, name: str) -> "_Name | _Object | str":
        if name in DTYPES:
            return name
        if name in NAMES:
            return _Name(name)
        if self.unwanted:
            return _Object(name[:MAX_KEY], self.where())
        raise self.refuse(f"holds a Python object made by {name[:MAX_KEY]!r}")

    def call(self, opcode: str, function: Any, arguments: Any) -> Any:
        match opcode, function, arguments:
            case _, _Object(), _:
                return function
            case "REDUCE", _Name("collections.OrderedDict"), ():
                return {}
            case "REDUCE", _Name("torch.Size"), (tuple() as sizes,):
                return sizes
            case "REDUCE", _Name("torch._utils._rebuild_parameter"), (LazyTensor() as tensor, _, _):
                return tensor
            case "REDUCE", _Name("torch._utils._rebuild_parameter_with_state"), (LazyTensor() as tensor, _, _, _):
                return tensor
            case "REDUCE", _Name("torch._utils._rebuild_tensor_v3"), (
                    _Storage() as storage, int(offset), tuple(shape), tuple(strides), _, _, str(dtype), *_
                    ) if dtype in V3_DTYPES:
                size = storage.size * storage.dtype.itemsize // V3_DTYPES[dtype].itemsize
                storage = dataclasses.replace(storage, dtype=V3_DTYPES[dtype], size=size)
                return self.tensor(storage, offset, shape, strides)
            case "REDUCE", _Name("torch._utils._rebuild_tensor_v2"), (
                    _Storage() as storage, int(offset), tuple(shape), tuple(strides), _, _, *extra):
                if any(extra):
                    raise self.refuse("has a tensor that is conjugated or negated in place")
                return self.tensor(storage, offset, shape, strides)
            case "NEWOBJ", _Name("argparse.Namespace"), ():
                return _Namespace({})
        name = function.name if isinstance(function, _Name) else type(function).__name__
        raise self.refuse(f"calls {name} in a way torch.save does not")

    def build(self, target: Any, state: Any) -> None:
        """Sets attributes, which are dropped for an OrderedDict and are the content of a Namespace."""
        match target, state:
            case _Namespace(), dict():
                target.attributes = state
            case dict() | _Object(), _:
                pass
            case _:
                raise self.refuse(f"sets attributes of a {type(target).__name__}")
        self.frames[-1].append(target)

    def storage(self, identifier: Any) -> _Storage:
        match identifier:
            case ("storage", _Name(name), str(key), str(), int(size)) if (
                    name == UNTYPED or name.removeprefix("torch.") in READ_STORAGES):
                dtype = READ_STORAGES.get(name.removeprefix("torch."), np.dtype(np.uint8))  # untyped: bytes
                member = f"{self.root}data/{key[:MAX_KEY]}"
            case _:
                raise self.refuse("refers to data outside the file in a way torch.save does not")
        if member not in self.members:
            raise _broken(self.path, f"member {member!r} is missing{self.where()}")
        offset, nbytes = self.members[member]
        if size * dtype.itemsize != nbytes:
            raise _broken(self.path, f"member {member!r} has {nbytes} bytes, expected {size} elements of "
                                     f"{dtype}{self.where()}")
        return _Storage(key, dtype, size, offset)

    def tensor(self, storage: _Storage, offset: int, shape: tuple, strides: tuple) -> LazyTensor:
        if len(shape) > MAX_AXES or len(strides) != len(shape) or not all(
                isinstance(number, int) and number >= 0 for number in (offset, *shape, *strides)):
            raise _broken(self.path, f"a tensor has an impossible shape or strides{self.where()}")
        if offset + span(shape, strides) > storage.size:
            raise _broken(self.path, f"a tensor with shape {shape}, strides {strides} and offset {offset} does not "
                                     f"fit its storage of {storage.size} elements{self.where()}")
        elements = math.prod(size or 1 for size in shape)
        if elements > storage.size and elements * storage.dtype.itemsize > MAX_EXPANDED:
            raise self.refuse(f"has a tensor of shape {shape} that repeats the {storage.size} elements of its storage; "
                              f"at most {MAX_EXPANDED} bytes of such a tensor are accepted")
        strides = tuple(stride if size > 1 else usual
                        for size, stride, usual in zip(shape, strides, contiguous(shape), strict=True))
        return LazyTensor(self.path, storage.key, storage.dtype, shape, strides,
                          storage.offset + offset * storage.dtype.itemsize)

    def finish(self, value: Any, key: str, depth: int) -> Any:
        """Returns a copy of the value in plain containers, with tensors named by their key.

        Shared values are repeated, so a structure that contains itself or expands without bounds raises an error here
        and not in functions that traverse the result.
        """
        self.values += 1
        if self.values > MAX_VALUES or depth > MAX_DEPTH or len(key) > MAX_KEY:
            raise WeightFileError(
                f"{self.path}: its structure contains itself or is far too large: more than {MAX_VALUES} values, "
                f"{MAX_DEPTH} levels or {MAX_KEY} characters of keys, at {key[:100]!r}. No model needs that; save "
                "its tensors alone as one flat dict.")
        match value:
            case dict() | _Namespace():
                items = value.attributes if isinstance(value, _Namespace) else value
                unwanted = self.unwanted if depth == 0 else ()
                return {name: None if name in unwanted else self.finish(item, _join(key, name), depth + 1)
                        for name, item in items.items()}
            case list() | tuple():
                return type(value)(self.finish(item, _join(key, i), depth + 1) for i, item in enumerate(value))
            case LazyTensor():
                return dataclasses.replace(value, key=key)
            case _Object(name, where):
                raise self.refuse(f"holds a Python object made by {name!r}", where or f" (at {key!r})")
            case _Name() | _Storage():
                raise self.refuse(f"holds a bare {getattr(value, 'name', 'storage')} at {key!r}")
        return value

    def where(self) -> str:
        """Returns the nearest dict key below the current value, for messages."""
        strings = (value for frame in reversed(self.frames) for value in reversed(frame)
                   if isinstance(value, str) and value != "storage")  # the first item of a reference to a storage
        key = next(strings, None)
        return "" if key is None else f" (near the key {key[:MAX_KEY]!r})"

    def refuse(self, what: str, where: str | None = None) -> WeightFileError:
        return WeightFileError(
            f"{self.path} {what}{self.where() if where is None else where}.\nOnly tensors in dicts and lists, with "
            "numbers and strings, are read, because building anything else could run code that is hidden in the file."
            "\nIf you trust its source, save its tensors alone with the PyTorch program it comes from:\n"
            f"  data = torch.load('{self.path.name}', map_location='cpu', weights_only=False)\n"
            "  print(data.keys())       # the tensors are in a member such as 'model', 'module' or 'state_dict', or at "
            "the top\n"
            "  weights = data['model']  # the name of that member; or: weights = data\n"
            "  torch.save({k: v.detach().clone() for k, v in weights.items() if torch.is_tensor(v)}, "
            f"'weights_{self.path.name}')")


def _join(key: str, name: Any) -> str:
    return f"{key}/{name}" if key else str(name)


# -------------------------------------------------------------------------------------------------------------- write


def save(path: str | os.PathLike, obj: Any) -> None:
    """Writes a file that torch.load reads, with and without `weights_only=True`. The bytes are deterministic.

    `obj` is nested dict (keys str or int), list, tuple, str, int, float, bool, None, np.ndarray and LazyTensor.
    Tensors are read and written one at a time. The file is renamed to `path` when it is complete.
    Raises TypeError naming every value that cannot be written, and what LazyTensor.read raises.
    """
    path = Path(path)
    tensors: list[np.ndarray | LazyTensor] = []
    offenders: list[str] = []
    program = b"\x80\x02" + b"".join(_pickle(obj, "", tensors, offenders)) + b"."
    if offenders:
        raise TypeError(f"Cannot write {len(offenders)} values to {path}; expected dict, list, tuple, str, int "
                        "(64 bit), float, bool, None, numpy arrays and LazyTensor:\n  " + "\n  ".join(offenders))
    partial = path.with_name(f".{path.name[:40]}.{os.getpid()}.partial")  # file names have a maximum length
    try:
        with open(partial, "wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                _add(archive, file, "data.pkl", program)
                _add(archive, file, "byteorder", b"little")
                for number, tensor in enumerate(tensors):
                    _add(archive, file, f"data/{number}", _little_endian(tensor))
                _add(archive, file, "version", b"3\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _add(archive: zipfile.ZipFile, file: BinaryIO, name: str, content: bytes | memoryview) -> None:
    """Adds one member whose content is aligned to 64 bytes, as torch.save does for memory mapping."""
    info = zipfile.ZipInfo(f"archive/{name}")  # dated 1980
    info.file_size, info.create_system = len(content), 3
    wide = info.file_size * 1.05 > zipfile.ZIP64_LIMIT  # the condition under which zipfile adds 20 bytes
    header = 30 + len(info.filename) + 20 * wide + 4
    padding = -(file.tell() + header) % 64
    info.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
    with archive.open(info, "w", force_zip64=wide) as member:
        member.write(content)


def _little_endian(tensor: np.ndarray | LazyTensor) -> memoryview:
    array = tensor.read() if isinstance(tensor, LazyTensor) else tensor
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8).data


def _pickle(value: Any, key: str, tensors: list, offenders: list[str]) -> Iterator[bytes]:
    """Yields the opcodes of protocol 2 that build the value; appends its tensors in the order of their storages."""

    def inner(items: Any) -> Iterator[bytes]:
        for name, item in items:
            yield from _pickle(item, _join(key, name), tensors, offenders)

    match value:
        case None:
            yield b"N"
        case bool():
            yield b"\x88" if value else b"\x89"
        case int() if value.bit_length() < 32:
            yield b"J" + struct.pack("<i", value)
        case int() if value.bit_length() <= 64:
            yield b"\x8a\x09" + value.to_bytes(9, "little", signed=True)
        case float():
            yield b"G" + struct.pack(">d", value)
        case str():
            text = value.encode("utf-8", "surrogatepass")
            yield b"X" + struct.pack("<I", len(text)) + text
        case dict() if all(isinstance(name, str | int) for name in value):
            yield b"}("
            for name, item in value.items():
                yield from _pickle(name, key, tensors, offenders)
                yield from inner([(name, item)])
            yield b"u"
        case list():
            yield b"](" + b"".join(inner(enumerate(value))) + b"e"
        case tuple():
            yield b"(" + b"".join(inner(enumerate(value))) + b"t"
        case np.ndarray() | LazyTensor() if value.dtype.newbyteorder("<") in STORAGES.values():
            dtype = value.dtype.newbyteorder("<")
            storage = next(name for name, stored in STORAGES.items() if stored == dtype)
            shape = tuple(value.shape)
            yield b"ctorch._utils\n_rebuild_tensor_v2\n(("
            yield from inner([("", "storage")])
            yield b"ctorch\n" + storage.encode() + b"\n"
            yield from inner([("", str(len(tensors))), ("", "cpu"), ("", math.prod(shape))])
            yield b"tQ"
            yield from inner([("", 0), ("", shape), ("", contiguous(shape))])
            yield b"\x89ccollections\nOrderedDict\n)RtR"
            tensors.append(value)
        case _:
            what = f"array of {value.dtype}" if isinstance(value, np.ndarray | LazyTensor) else type(value).__name__
            offenders.append(f"{key or 'the whole'}: {what}")
