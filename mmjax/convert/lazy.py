"""Tensors that are read from their file on demand, and the error of the weight readers."""

import dataclasses
import math
from pathlib import Path

import numpy as np

# A table of contents larger than this is refused: 8 MiB describe about 50,000 tensors, and the largest
# file we convert (LLaMA 65B in one piece, with optimizer state) has a few thousand.
MAX_HEADER = 8 * 2**20
MAX_AXES = 32


class WeightFileError(ValueError):
    """Raised for a weight file that cannot be read; the message states the file, the problem and what to do."""


@dataclasses.dataclass(frozen=True, slots=True)
class LazyTensor:
    """One tensor of a weight file: the position of its bytes and their layout."""

    path: Path
    key: str
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements, as PyTorch counts them
    offset: int  # of the first element, in bytes from the start of the file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def source(self) -> str:
        """File and key, for messages."""
        return f"{self.path.name}: {self.key}"

    def read(self) -> np.ndarray:
        """Returns the tensor in new memory, C-contiguous; the file is neither kept open nor mapped.

        The file is read and not memory-mapped, so that a file that shrinks raises an error instead of SIGBUS. Needs the
        memory of the tensor, and for a strided tensor also that of the part of the file that it spans.
        Raises WeightFileError if the file can no longer be read to the tensor's end.
        """
        count = span(self.shape, self.strides)
        values = self._bytes(self.offset, count * self.dtype.itemsize).view(self.dtype)
        if self.strides == contiguous(self.shape) or not count:
            return values.reshape(self.shape)
        steps = [stride * self.dtype.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(values, self.shape, steps).copy()

    def _bytes(self, offset: int, size: int) -> np.ndarray:
        """Reads bytes of the file. Raises WeightFileError if they are not there."""
        raw = np.empty(size, np.uint8)
        try:
            with open(self.path, "rb") as file:
                file.seek(offset)
                got = file.readinto(raw)
        except OSError as error:
            raise WeightFileError(f"{self.source}: cannot read it ({error}).") from error
        if got != raw.nbytes:
            raise WeightFileError(f"{self.source}: only {got} of {raw.nbytes} bytes are left in the file. "
                                  "It was changed after it was opened; start again with the complete file.")
        return raw

    def sample(self, count: int = 1024) -> np.ndarray:
        """Returns the first, middle and last `count` numbers, flat; all of a smaller or a strided tensor.

        Raises WeightFileError as `read` does.
        """
        size = math.prod(self.shape)
        if size <= 3 * count or self.strides != contiguous(self.shape):
            values = self.read().reshape(-1)
            return values if size <= 3 * count else np.concatenate(
                [values[start : start + count] for start in (0, (size - count) // 2, size - count)])
        width = self.dtype.itemsize
        return np.concatenate([self._bytes(self.offset + start * width, count * width).view(self.dtype)
                               for start in (0, (size - count) // 2, size - count)])


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the strides, in elements, of a C-contiguous array."""
    return tuple(math.prod(shape[axis + 1:]) for axis in range(len(shape)))


def span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Returns the number of elements from the first to the last element of such a tensor."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def kind(path: Path) -> str:
    """Returns what a file is by its first bytes: `"zip"`, `"safetensors"`, or a message saying what else it is.

    Raises WeightFileError if the file does not exist or is empty.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except FileNotFoundError as error:
        raise WeightFileError(f"{path}: there is no such file.") from error
    except IsADirectoryError as error:
        raise WeightFileError(f"{path} is a folder; name the weight file inside it.") from error
    except OSError as error:
        raise WeightFileError(f"{path}: cannot open it ({error}).") from error
    text = head.lstrip().lower()
    if not head:
        raise WeightFileError(f"{path} is empty. The download probably failed; download it again.")
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head[8:9] == b"{" and head[6:8] == b"\0\0":  # a length below 2**48, then JSON
        return "safetensors"
    if head.startswith(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."):  # the pickled number 0x1950a86a20f9469cfc6c
        return ("is in the format that PyTorch wrote before version 1.6, which is not read here.\n"
                "Save it again where PyTorch is installed:\n"
                f'  python -c "import torch; torch.save(torch.load(\'{path.name}\', map_location=\'cpu\'), '
                f'\'new_{path.name}\')"')
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return ("is a web page, not weights. The site answered the download with a page (a log-in, a licence or an "
                "error); open the file in a browser to see which, then download again.")
    if text.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the weights themselves. Run `git lfs pull` in the folder it came from."
    if head.startswith(b"\x80"):
        return "is a bare pickle, not a file written by torch.save. Save its tensors with torch.save."
    return (f"is not a weight file: it begins with {head[:16]!r}. Expected a zip archive written by torch.save, or "
            "safetensors. Download it again, and compare its size with the one the site states.")
