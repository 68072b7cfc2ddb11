"""Reads small malicious files and checks that each gives a result or a one-line error in little memory.

    python benchmarks/hostile.py                 about 40 files, written to a temporary folder; half a minute
    python benchmarks/hostile.py FILE ...        other files, read by their endings: .wav, .npy, .npz, .p, images
    python benchmarks/hostile.py FOLDER ...      all files below folders, such as corpora that others made: the images
                                                 of Pillow's tests, SciPy's sounds (scipy/io/tests/data), JSONTestSuite,
                                                 the pickles of picklescan and modelaudit
    python benchmarks/hostile.py --most 500      fails above this many megabytes

Each file is read in a forked process, which reports its peak memory. Fails if a process dies, raises an error other
than ValueError or OSError, executes something, takes more than ten seconds of the processor, or needs more memory. The
last line has the counts; files with other endings are counted as left out.
"""

import argparse
import collections
import io
import json
import os
import pickle
import signal
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import machine
from mmjax import files
from mmjax.convert import torch_file
from mmjax.data import arrays, images, senses
from mmjax.data.formats import grounding
from mmjax.data.formats.webdataset import index as tar_index

# ---- the files ----


def wav(rate: int, size: int = 128, channels: int = 1, bits: int = 16, claimed: int | None = None) -> bytes:
    """Returns a WAV file of `size` bytes whose header says `claimed`."""
    width = max(1, bits // 8) * channels
    head = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + size, b"WAVE", b"fmt ", 16, 1, channels, rate,
                       rate * width & 0xFFFFFFFF, width & 0xFFFF, bits, b"data", size if claimed is None else claimed)
    return head + bytes(range(1, 129)) * (size // 128)


def png(width: int, height: int, colour: int = 0, present: bool = True) -> bytes:
    """Returns an image of one colour (0: grey, 2: RGB, 6: RGBA); without its pixels if they are not `present`."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    row, packer = bytes(1 + width * {0: 1, 2: 3, 6: 4}[colour]), zlib.compressobj(9)
    pixels = b"".join(packer.compress(row) for _ in range(height if present else 0)) + packer.flush()
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
            + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))


def npy(descr: str, shape: str, content: bytes = bytes(64)) -> bytes:
    """Returns a .npy file. descr, shape: the text of the header"""
    head = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + content


def nested(depth: int, around: bytes, key: bool = False) -> bytes:
    """Returns a pickled list of a dictionary with, as a value or as a key, an empty tuple in `depth` of `around`."""
    inner = b")" + around * depth
    return b"\x80\x04](}(" + (inner + b"N" if key else b"N" + inner) + b"ue."


def doubling(depth: int) -> bytes:
    """Returns a pickled list that contains a list twice, and so on, `depth` times: 2 to the power of `depth` values."""
    program = b"]q\x00"
    for level in range(depth):
        program += b"](h" + bytes([level]) + b"h" + bytes([level]) + b"eq" + bytes([level + 1])
    return b"\x80\x04" + program + b"."


def npz(count: int, size: int) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **{f"x{number}": np.zeros(size, np.uint8) for number in range(count)})
    return file.getvalue()


def tiff(side: int, tile: int) -> bytes:
    """Returns an image of side x side grey pixels in tiles of tile x tile, whose content is missing."""
    tags = ((256, 4, side), (257, 4, side), (258, 3, 8), (259, 3, 5), (262, 3, 1), (277, 3, 1), (322, 4, tile),
            (323, 4, tile), (324, 4, 8), (325, 4, 100))
    return (b"II*\0" + struct.pack("<I", 108) + bytes(100) + struct.pack("<H", len(tags))
            + b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags) + bytes(4))


def encoded(kind: str, size: tuple[int, int], mode: str = "L", **options: object) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind, **options)
    return file.getvalue()


def cases() -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yields (name, function that returns the content) of each file."""
    for rate in (0, 1, 2, 7, 41, 4_001, 44_101, 48_001, 192_001, 999_983, 2**31 - 1):
        yield f"rate_{rate}.wav", partial(wav, rate)
        yield f"rate_{rate}_large.wav", partial(wav, rate, 256_000)
    yield "channels.wav", partial(wav, 41, 131_072, channels=65_535, bits=8)
    yield "channels_64.wav", partial(wav, 41, 1_024_000, channels=64, bits=8)
    yield "claim.wav", partial(wav, 16_000, claimed=2**31 - 2**20)
    yield "pipe.wav", partial(wav, 16_000, claimed=2**32 - 1)
    yield "bits_64.wav", partial(wav, 16_000, bits=64)
    for width, height in ((1, 3_000), (3_000, 1), (1, 65_535), (65_535, 1), (2, 1_000_000), (40_000_000, 1)):
        yield f"thin_{width}x{height}.png", partial(png, width, height)
    yield "flat.png", partial(png, 9_000, 9_900, 6)
    yield "flat_grey.png", partial(png, 5_600, 5_700)
    yield "flat.jpg", partial(encoded, "JPEG", (9_000, 9_900), "RGB", progressive=True)
    yield "claim.png", partial(png, 60_000, 60_000, present=False)
    gif = encoded("GIF", (8, 8))
    yield "claim.gif", lambda: gif[:6] + b"\xff" * 4 + gif[10:]
    yield "frame.gif", lambda: gif.replace(b",\0\0\0\0\x08\0\x08\0", b",\0\0\0\0" + b"\xff" * 4)
    yield "claim.tiff", partial(tiff, 2**31 - 1, 256)
    yield "tile.tiff", partial(tiff, 8, 32_000)
    for name, descr, shape in (
            ("claim", "'<f4'", "(1000000, 1000000)"), ("negative", "'<f4'", "(-1, 4)"), ("bool", "'<f8'", "(True, 4)"),
            ("overflow", "'<f8'", f"({10**20}, 1)"), ("hidden", "'<f4'", f"(0, {2**62}, 4)"),
            ("object", "'|O'", "(2,)"), ("records", "[('a', '<f4')]", "(2,)"), ("empty", "'|V0'", "(1,)"),
            ("times", "'<M8[ns]'", "(2,)"), ("brackets", "(" * 50, "(2,)"), ("big_endian", "'>f8'", "(2, 4)")):
        yield f"{name}.npy", partial(npy, descr, shape)
    yield "bomb.npz", partial(npz, 4, 2**28)
    yield "tuples_key.p", partial(nested, 200_000, b"\x85", key=True)
    yield "tuples.p", partial(nested, 200_000, b"\x85")
    yield "frozensets.p", lambda: b"\x80\x04](" + b"(" * 1_000 + b"\x91" * 1_000 + b"e."
    yield "lists.p", lambda: b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b"."
    yield "dicts.p", lambda: b"\x80\x04]" + b"}N" * 100_000 + b"N" + b"s" * 100_000 + b"a."
    yield "doubling.p", partial(doubling, 15)
    yield "doubling_deep.p", partial(doubling, 200)
    yield "length.p", lambda: b"\x80\x04]\x8d" + b"\xff" * 7 + b"\x7fa."
    yield "refs.p", lambda: pickle.dumps([{"sentences": [{"raw": "left"}], "split": "train"}])


# ---- reading them ----

PICKLES, TORCH = (".p", ".pkl", ".pickle"), (".pt", ".pth", ".bin")
KNOWN = (*PICKLES, *TORCH, ".wav", ".npy", ".npz", ".json", ".tar", *images.SUFFIXES)


def read(path: Path) -> str:
    """Reads a file and returns a summary. Raises ValueError or OSError if it is invalid."""
    if path.suffix == ".wav":
        return f"float32{list(senses.sound(path).shape)}"
    if path.suffix == ".npy":
        return f"{(array := arrays.read_npy(path)).dtype}{list(array.shape)}"
    if path.suffix == ".npz":
        return f"{len(arrays.read_npz(path))} arrays"
    if path.suffix in PICKLES:
        return f"{len(grounding.plain_pickle(path))} references"
    if path.suffix in TORCH:
        return f"{type(torch_file.load(path)).__name__}"
    if path.suffix == ".json":
        return f"{type(files.parse_json(path.read_bytes())).__name__}"
    if path.suffix == ".tar":
        return f"{len(tar_index(str(path)).keys)} samples"
    random = np.random.default_rng(0)
    for options in ({}, {"fit": "center_crop"}, {"fit": "center_crop", "random": random}, {"fit": "pad"}):
        pixels = images.load(path, 224, **options)
    return f"uint8{list(pixels.shape)}"


def expanded(paths: list[Path]) -> tuple[list[Path], int]:
    """Returns (the files, and those below the folders, that `read` knows; the number of others below the folders)."""
    below = [each for path in paths if path.is_dir() for each in sorted(path.rglob("*")) if each.is_file()]
    known = [each for each in below if each.suffix.lower() in KNOWN]
    return [path for path in paths if not path.is_dir()] + known, len(below) - len(known)


def measured(path: Path) -> tuple[str, int | None, float]:
    """Returns (result of reading a file, peak bytes, seconds), in a new process; None bytes if it died or failed."""
    from benchmarks import mutations

    begun, (reading_end, writing_end) = time.monotonic(), os.pipe()
    if not (child := os.fork()):
        machine.forget_peak()
        mutations.watch()
        signal.setitimer(signal.ITIMER_PROF, mutations.SECONDS)  # ends the process
        try:
            with mutations.watching() as seen:
                result = read(path), machine.peak()
            if seen:
                result = f"executed {seen[0]}", None
        except (ValueError, OSError) as error:
            result = f"refused: {error}", machine.peak()
        except BaseException as error:
            result = f"{type(error).__name__}: {error}", None
        os.write(writing_end, json.dumps(result).encode()[:60_000])
        os._exit(0)
    os.close(writing_end)
    with os.fdopen(reading_end, "rb") as pipe:
        content = pipe.read()
    _, status = os.waitpid(child, 0)
    result, peak = json.loads(content) if content else (f"the process died with status {status}", None)
    return result, peak, time.monotonic() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--most", type=int, default=500, help="limit of a file in megabytes")
    options = parser.parse_args()
    failed, counts, options.files, others = [], collections.Counter(), *expanded(options.files)
    with tempfile.TemporaryDirectory(prefix="mmjax-hostile-") as folder:
        written = ((Path(folder) / name, content) for name, content in (() if options.files else cases()))
        for path, content in [(path, None) for path in options.files] or written:
            if content is not None:
                path.write_bytes(content())
            result, peak, seconds = measured(path)
            megabytes = "failed" if peak is None else f"{peak / 1e6:.0f} MB"
            print(f"{path.name:24} {path.stat().st_size:9,} bytes  {megabytes:>7} {seconds:5.1f} s  "
                  f"{result.replace(folder + '/', '')}", flush=True)
            refused = result.startswith("refused: ")
            if peak is None or peak > options.most * 1e6:
                failed.append(path.name)
            counts["failed" if path.name in failed[-1:] else "refused" if refused else "read"] += 1
    print(", ".join(f"{kind} {count:,}" for kind, count in sorted(counts.items()))
          + (f"; {others:,} files with other endings left out" if others else ""))
    if failed:
        sys.exit(f"Died, raised something else or took more than {options.most} MB: {', '.join(failed)}")


if __name__ == "__main__":
    main()
