"""Reads and writes `.safetensors` files tensor by tensor.

The format is eight bytes of length, a JSON table and the numbers. Reading it directly takes fewer lines than adapting
the `safetensors` package to bfloat16 in numpy, to LazyTensor and to WeightFileError.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from mmjax.convert.lazy import MAX_AXES, MAX_HEADER, LazyTensor, WeightFileError, contiguous, kind

# float8 and complex tensors are read so that they can be named: no parameter has such a dtype. Smaller dtypes are left
# out, because several numbers share a byte.
DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_),
    "U16": np.dtype(np.uint16), "U32": np.dtype(np.uint32), "U64": np.dtype(np.uint64),
    "C64": np.dtype(np.complex64), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2), "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}  # fmt: skip


def load(path: str | os.PathLike) -> dict[str, LazyTensor]:
    """Returns the tensors of a file by name; its `__metadata__` is dropped.

    Raises WeightFileError if the file is something else or damaged: as the format requires, the tensors must fill it
    without gap or overlap.
    """
    path = Path(path)
    found = kind(path)
    if found == "zip":
        raise WeightFileError(f"{path} is a zip archive, probably a file of torch.save, whatever its name says. Rename "
                              f"it to {path.with_suffix('.pth').name} and pass that.")
    if found != "safetensors":
        raise WeightFileError(f"{path} {found}")
    again = "\nDownload it again, and compare its size with the one the site states."
    length = path.stat().st_size
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > min(MAX_HEADER, length - 8):
            raise WeightFileError(f"{path} is cut off or damaged: its header would take {size} bytes, of {length} in "
                                  f"the file and {MAX_HEADER} that are accepted.{again}")
        try:
            table = json.loads(file.read(size), object_pairs_hook=_no_duplicates)
        except (ValueError, RecursionError) as error:
            raise WeightFileError(f"{path} is damaged: its header is not readable ({error}).{again}") from error

    tensors, extents, problems = {}, [], []
    table.pop("__metadata__", None)
    for key, entry in table.items():
        match entry:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(first), int(last)]} if (
                    len(shape) <= MAX_AXES and all(type(axis) is int and axis >= 0 for axis in shape)
                    and math.prod(axis or 1 for axis in shape) < 2**48):
                if dtype not in DTYPES:
                    problems.append(f"{key}: dtype {dtype} is not supported; expected one of {', '.join(DTYPES)}")
                elif last - first != math.prod(shape) * DTYPES[dtype].itemsize:
                    problems.append(f"{key}: {last - first} bytes for {dtype} {shape}")
                else:
                    tensors[key] = LazyTensor(path, key, DTYPES[dtype], tuple(shape), contiguous(shape),
                                              8 + size + first)
                    extents.append((first, last, key))
            case _:
                problems.append(f"{key}: expected a dtype, a shape and two data_offsets, got {str(entry)[:100]}")
    end = 0
    for first, last, key in sorted(extents):
        if first != end and not problems:
            problems.append(f"{key}: begins at byte {first} of the data, expected {end}")
        end = last
    if end != length - 8 - size and not problems:
        problems.append(f"the tensors take {end} bytes, and {length - 8 - size} follow the header")
    if problems:
        raise WeightFileError(f"{path} cannot be read:\n  " + "\n  ".join(problems[:20]) + again)
    return tensors


def save(path: str | os.PathLike, tensors: Mapping[str, np.ndarray | LazyTensor]) -> None:
    """Writes tensors, one after the other. The file is renamed to `path` when it is complete.

    Raises TypeError for a dtype that the format does not have, and what LazyTensor.read raises.
    """
    path, names = Path(path), {dtype: name for name, dtype in DTYPES.items()}
    table, end = {"__metadata__": {"format": "pt"}}, 0
    for key, tensor in tensors.items():
        if np.dtype(tensor.dtype) not in names:
            raise TypeError(f"Cannot write {key} to {path}: {tensor.dtype} has no name in safetensors.")
        size = math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize
        table[key] = {"dtype": names[np.dtype(tensor.dtype)], "shape": list(tensor.shape),
                      "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the numbers are aligned to 8 bytes
    partial = path.with_name(f".{path.name[:40]}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for tensor in tensors.values():
                array = tensor.read() if isinstance(tensor, LazyTensor) else tensor
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table
