"""Preprocesses inputs of ImageBind's towers (imagebind/data.py, imagebind/models/multimodal_preprocessors.py), and
stacks them into batches.

C channels   S side of an image   M mel bins   T frames of a spectrogram

Numpy on the host. Images keep their aspect ratio, unlike MiniGPT-4's. Depth, thermal and imu are given as arrays: the
original has no transform for them. Video files are not decoded; a video is given as its frames.
"""

import dataclasses
import functools
import gzip
import html
import math
import os
import re
import struct
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mmjax import files
from mmjax.batch import Sample
from mmjax.data.arrays import read_npy
from mmjax.data.images import THIN, load, no_image, open_file
from mmjax.models.pixels import MEAN, STD, normalise
from mmjax.models.senses import sense_of
from mmjax.tokenizer import WORDS

# ---- images ----


def image(source: Any, size: int = 224, random: np.random.Generator | None = None) -> np.ndarray:
    """Returns float32[3,S,S]: the center or a random crop of an image whose short side is scaled to S; normalised.

    source: as for `mmjax.data.images.load`; a normalised image is unchanged
    random: draws a random crop, as in training

    Raises ValueError naming an input that cannot be used.
    """
    return normalise(load(source, size, "center_crop", random))


# ---- video and its clips ----


def clip_times(duration: float, clips: int, seconds: float) -> list[tuple[Fraction, Fraction]]:
    """Returns (start, end) of each clip, evenly spaced over a recording; all start at 0 if it is too short.

    Fractions, as in the pytorchvideo commit that the original pins: the samples of a float such as 0.6 depend on it.
    """
    step = Fraction(max(duration - seconds, 0.0)) / max(clips - 1, 1)
    return [(step * i, step * i + Fraction(seconds)) for i in range(clips)]


def video(frames: np.ndarray, fps: float, size: int = 224, clips: int = 5, seconds: float = 2.0,
          shown: int = 2) -> np.ndarray:
    """Returns float32[3·clips, 3, shown, S, S]: three crops of each clip along the long side, `shown` frames each.

    frames: uint8[N,H,W,3], all frames of the video. Raises ValueError if a clip has none.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not len(frames):
        raise ValueError(f"A video must be uint8[N,H,W,3] with N > 0, got {frames.dtype}{list(frames.shape)}.")
    if not 0 < fps < math.inf:
        raise ValueError(f"A video must have a number of frames a second above 0, got {fps}.")
    sides = _scaled_sides(*frames.shape[1:3], size)
    thin = max(sides) > THIN * size
    crops = []
    for start, end in clip_times(len(frames) / fps, clips, seconds):
        inside = [i for i in range(len(frames)) if start <= i / fps < end]
        if not inside:
            raise ValueError(f"No frame lies between {float(start):.3f} s and {float(end):.3f} s at {fps} frames a "
                             "second; take longer clips.")
        chosen = frames[[inside[int(i)] for i in np.linspace(0, len(inside) - 1, shown)]]
        chosen = chosen.astype(np.float32) / np.float32(255)
        height, width = sides
        pixels = None if thin else _normalised(_scaled(chosen, sides, range(height), range(width)))
        for third in range(3):
            top, left = math.ceil((height - size) / 2), math.ceil((width - size) / 2)
            if height > width:
                top = (0, top, height - size)[third]
            else:
                left = (0, left, width - size)[third]
            if thin:  # the whole frame would take much memory
                part = _scaled(chosen, sides, range(top, top + size), range(left, left + size))
                crops.append(_normalised(part))
            else:
                crops.append(pixels[:, :, top:top + size, left:left + size])
    return np.stack(crops)


def _normalised(pixels: np.ndarray) -> np.ndarray:
    """Returns normalised [C,N,H,W] of [N,H,W,C]."""
    return ((pixels - np.float32(MEAN)) / np.float32(STD)).transpose(3, 0, 1, 2)


def _scaled_sides(height: int, width: int, size: int) -> tuple[int, int]:
    """Returns (height, width) with the short side S."""
    if width < height:
        return math.floor(height / width * size), size
    return size, math.floor(width / height * size)


def _scaled(frames: np.ndarray, sides: tuple[int, int], rows: range, columns: range) -> np.ndarray:
    """Returns rows and columns of [N,H,W,C] scaled to `sides`: bilinear, half-pixel centres, not antialiased."""
    return np.einsum("hp,wq,npqc->nhwc", _bilinear(frames.shape[1], sides[0], rows),
                     _bilinear(frames.shape[2], sides[1], columns), frames, optimize=True)


def _bilinear(source: int, target: int, wanted: range) -> np.ndarray:
    """Returns float32[wanted, source]: the wanted rows of the interpolation matrix [target, source]."""
    centre = ((np.arange(wanted.start, wanted.stop) + 0.5) * source / target - 0.5).clip(0, source - 1)
    return np.maximum(1 - np.abs(centre[:, None] - np.arange(source)), 0).astype(np.float32)


# ---- arrays in files ----

SENSES_OF_FILES = {
    "video": "float32[clips,3,2,S,S], normalised as by `mmjax.data.senses.video`",
    "depth": "float32[1,S,S], normalised disparity; or of float32[H,W], distances in metres. Or a 16-bit .png of "
             "distances in millimetres",
    "thermal": "float32[1,S,S], brightness from 0 to 1",
    "imu": "float32[6,2000], 5 s at 400 Hz: acceleration and angular velocity, normalised",
}


def read_array(name: str, path: str | os.PathLike) -> np.ndarray:
    """Returns the input of a sense in a .npy file, or depth in a 16-bit .png.

    Raises ValueError naming the file if it cannot be read, or has numbers that are not finite.
    """
    wanted = SENSES_OF_FILES.get(name, "an array")
    if str(path).lower().endswith(".png") and name == "depth":
        return read_depth(path)
    try:
        array = read_npy(path)
    except (ValueError, OSError) as error:
        raise ValueError(files.url_problem(path) or f"{path} cannot be read as an array: {error}. Expected for {name}: "
                         f"a .npy file of {wanted}") from error
    try:
        check_finite(array)
    except ValueError as error:
        raise ValueError(f"{path} cannot be used for {name}: {error}") from error
    return array


FOCAL_TIMES_BASELINE = 518.857901 * 0.075  # pixels times metres, of the Kinect that recorded NYU Depth v2
NEAREST, FARTHEST = 0.01, 50.0  # metres
MOST_DISPARITY, DISPARITY_MEAN, DISPARITY_STD = 75.0, 0.0418, 0.0295


def read_depth(path: str | os.PathLike) -> np.ndarray:
    """Returns float32[H,W], distances in metres, of a 16-bit grey .png of millimetres; 0 is a missing measurement.

    Raises ValueError naming a file that cannot be read or has another mode.
    """
    if not os.path.isfile(path):
        raise ValueError(files.url_problem(path) or no_image(path))
    try:
        with open_file(path, os.path.getsize(path)) as opened:
            mode, pixels = opened.mode, np.asarray(opened)
    except Exception as error:  # decoders raise any error for damaged bytes
        raise ValueError(f"{path} is not an image that can be read: {error}") from error
    if not mode.startswith("I"):
        raise ValueError(f"{path} cannot be used for depth: its mode is {mode}. Expected for depth: "
                         f"{SENSES_OF_FILES['depth']}")
    return pixels.astype(np.float32) / 1000


def depth(distances: np.ndarray, size: int = 224) -> np.ndarray:
    """Returns float32[1,S,S]: normalised disparity of the center of a map of distances in metres, float[H,W].

    ImageBind was trained on disparity, focal length times baseline over distance, between 0 and 75, divided by 75 and
    normalised (facebookresearch/ImageBind issues 69 and 107). The focal length and baseline of NYU Depth v2 are used
    for every camera. The disparity of a missing measurement, 0 metres, is 0. Bilinear; not antialiased.

    Raises ValueError for an empty map, and for numbers that are negative, NaN or infinite.
    """
    if not distances.size:
        raise ValueError(f"a map of distances in metres must be float32[H,W], got {list(distances.shape)}")
    check_finite(distances)
    if (count := int((distances < 0).sum())):
        raise ValueError(f"{count:,} of {distances.size:,} distances are negative; they are metres")
    measured = np.clip(distances.astype(np.float32), NEAREST, FARTHEST)
    disparity = np.where(distances > 0, FOCAL_TIMES_BASELINE / measured, 0).clip(0, MOST_DISPARITY) / MOST_DISPARITY
    sides = _scaled_sides(*distances.shape, size)
    top, left = (math.ceil((side - size) / 2) for side in sides)
    square = _scaled(disparity[None, :, :, None].astype(np.float32), sides, range(top, top + size),
                     range(left, left + size))[0, :, :, 0]
    return ((square - DISPARITY_MEAN) / DISPARITY_STD)[None].astype(np.float32)


def check_finite(array: np.ndarray) -> None:
    """Raises ValueError with the number of values that are NaN or infinite."""
    if np.issubdtype(array.dtype, np.inexact) and (count := int((~np.isfinite(array)).sum())):
        raise ValueError(f"{count:,} of {array.size:,} numbers are NaN or infinite")


# ---- sound ----

RATE = 16_000
LEAST_RATE, MOST_RATE = 40, 1_000_000  # samples a second; lower rates do not reach the lowest mel filter
MOST_CHANNELS = 64
UNKNOWN_LENGTH = 0x7FFF0000  # bytes; lengths from here on are those of programs that write to a pipe
KERNEL = 2**23  # taps of all kernels of a resampling, above which samples are resampled in parts
WHOLE = 2**24  # samples of an upsampled recording, above which only its clips are resampled
PART = 2**19  # taps at once
CROSSINGS, CUTOFF = 6, 0.99  # of the sinc kernel: zero crossings, and cutoff relative to the lower Nyquist frequency
SOUND_MEAN, SOUND_STD = -4.268, 9.138
LOWEST = 20.0  # hertz, of the mel filters


PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE  # formats of a .wav file
BITS = {PCM: (8, 16, 24, 32), FLOAT: (32, 64)}  # of a sample
CONVERT = "Convert it: ffmpeg -i FILE -ac 1 -c:a pcm_s16le NEW.wav"


@dataclasses.dataclass(frozen=True)
class WavHeader:
    """The header of a .wav file.

    kind:    PCM or FLOAT
    start:   position of the samples in the file
    claimed: number of bytes of samples, as the file says
    """

    kind: int
    channels: int
    rate: int
    bits: int
    start: int
    claimed: int


def read_wav(path: str | Path) -> tuple[np.ndarray, int]:
    """Returns (float32[C,samples] between -1 and 1, samples a second) of a .wav file of PCM or float samples.

    Raises ValueError naming the file if it is something else, is truncated, or has numbers that are not finite. The
    very large length that programs write when they do not know it (ffmpeg into a pipe) means the rest of the file.
    """
    if not Path(path).is_file():  # neither a folder nor a pipe, which would block
        raise ValueError(files.url_problem(path) or f"No sound at {path}.")
    try:
        with open(path, "rb") as file:
            header = _wav_header(file)
            file.seek(header.start)
            raw = file.read(min(header.claimed, os.path.getsize(path)))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is not a PCM .wav file ({error}). {CONVERT}") from error
    try:
        _check_sound(header.channels, header.rate)
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
    if len(raw) < header.claimed < UNKNOWN_LENGTH:
        raise ValueError(f"{path} is cut off: its header says {header.claimed} bytes of sound, {len(raw)} are there.")
    samples = _wav_samples(raw, header)
    try:
        check_finite(samples)
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
    return samples, header.rate


def _wav_header(file: BinaryIO) -> WavHeader:
    """Returns the header of a RIFF file. Raises ValueError for any other file, and for samples that are not read."""
    start = file.read(12)
    if start[:4] != b"RIFF" or start[8:] != b"WAVE":
        raise ValueError("it does not begin with RIFF and WAVE")
    form: tuple[int, ...] | None = None
    while len(head := file.read(8)) == 8:
        name, size = head[:4], int.from_bytes(head[4:], "little")
        if name == b"data":
            if form is None:
                raise ValueError("its samples come before their format")
            kind, channels, rate, bits = form
            return WavHeader(kind, channels, rate, bits, file.tell(), size)
        if name == b"fmt ":
            form = _wav_format(file.read(min(size, 40)))
            size -= min(size, 40)
        file.seek(size + size % 2, os.SEEK_CUR)
    raise ValueError("it has no samples, or its chunks are damaged")


def _wav_format(chunk: bytes) -> tuple[int, int, int, int]:
    """Returns (kind, channels, samples a second, bits of a sample) of a format chunk."""
    if len(chunk) < 16:
        raise ValueError("its format is cut off")
    kind, channels, rate, _, width, bits = struct.unpack_from("<HHIIHH", chunk)
    if kind == EXTENSIBLE and len(chunk) >= 26:
        kind = int.from_bytes(chunk[24:26], "little")  # the first bytes of the subformat
    if kind not in BITS:
        raise ValueError(f"unknown format: {kind}")
    whole = -(-bits // 8) * 8  # fewer are in the upper bits of whole bytes
    if whole not in BITS[kind]:
        raise ValueError(f"its samples have {bits} bits, not {', '.join(map(str, BITS[kind]))}")
    if not channels or width != channels * whole // 8:
        raise ValueError(f"it says {channels} channels of {bits} bits, but {width} bytes for all of them")
    return kind, channels, rate, whole


def _wav_samples(raw: bytes, header: WavHeader) -> np.ndarray:
    """Returns float32[C,samples] of the bytes of a file; an incomplete last sample is dropped."""
    width = header.bits // 8
    frames = np.frombuffer(raw, np.uint8, len(raw) // (width * header.channels) * width * header.channels)
    frames = frames.reshape(-1, width)
    if header.kind == FLOAT:
        samples = np.ascontiguousarray(frames).view(f"<f{width}")[:, 0].astype(np.float32)
    elif width == 1:  # unsigned
        samples = frames[:, 0].astype(np.float32) / 128 - 1
    else:  # little endian, moved to the top of 32 bits
        wide = np.zeros((len(frames), 4), np.uint8)
        wide[:, 4 - width:] = frames
        samples = wide.view("<i4")[:, 0].astype(np.float32) * np.float32(2.0**-31)  # exact: a power of two
    return samples.reshape(-1, header.channels).T


def _check_sound(channels: int, rate: int) -> None:
    """Raises ValueError for unusual rates and numbers of channels, which could take much memory."""
    if not LEAST_RATE <= rate <= MOST_RATE or rate != int(rate):
        raise ValueError(f"it says {rate} samples a second; whole numbers from {LEAST_RATE} to {MOST_RATE} are read")
    if channels > MOST_CHANNELS:
        raise ValueError(f"it has {channels} channels; at most {MOST_CHANNELS} are read, and the first is used")


def resample(waveform: np.ndarray, rate: int, target: int) -> np.ndarray:
    """Returns float32[C,samples] at another rate, by a Hann-windowed sinc of six zero crossings with a cutoff at 99 %
    of the lower Nyquist frequency (torchaudio.functional.resample)."""
    if rate == target:
        return waveform
    common = math.gcd(rate, target)
    old, new = rate // common, target // common
    crossings, cutoff = CROSSINGS, min(old, new) * CUTOFF
    if new * old > KERNEL:
        return resampled_part(waveform, rate, target, 0, math.ceil(new * waveform.shape[1] / old))
    reach = math.ceil(crossings * old / cutoff)
    # float32 throughout, as torchaudio computes it: the taps differ from exact ones by 1e-5
    t = np.arange(-reach, reach + old, dtype=np.float32) / old - (np.arange(new, dtype=np.float32) / new)[:, None]
    t = (t * np.float32(cutoff)).clip(-crossings, crossings)
    kernels = np.sinc(t) * np.cos(t * np.float32(np.pi / crossings / 2)) ** 2 * np.float32(cutoff / old)
    padded = np.pad(waveform, ((0, 0), (reach, reach + old)))
    pieces = np.lib.stride_tricks.sliding_window_view(padded, kernels.shape[1], axis=1)[:, ::old]
    out = (pieces @ kernels.T).reshape(len(waveform), -1)
    return out[:, :math.ceil(new * waveform.shape[1] / old)]


def resampled_part(waveform: np.ndarray, rate: int, target: int, start: int, stop: int) -> np.ndarray:
    """Returns float32[C,stop-start]: a part of the result of `resample`, to 1e-4, with little memory at any rate.

    The nonzero taps of each sample are computed separately.
    """
    length, crossings = waveform.shape[1], CROSSINGS
    if not length:
        return np.zeros((len(waveform), stop - start), np.float32)
    cutoff = min(rate, target) * CUTOFF  # zero crossings a second
    reach = math.ceil(crossings * rate / cutoff)
    taps = np.arange(min(2 * reach + 1, length))
    out = np.empty((len(waveform), stop - start), np.float32)
    rows = max(1, PART // (len(taps) * len(waveform)))
    for first in range(start, stop, rows):
        time = np.arange(first, min(first + rows, stop), dtype=np.int64) * rate  # in samples, times `target`
        begin = np.clip(time // target - reach, 0, length - len(taps))
        inputs = begin[:, None] + taps
        t = (inputs * target - time[:, None]) * (cutoff / (rate * target))
        kernels = np.sinc(t) * np.cos(t * (np.pi / crossings / 2)) ** 2 * (np.abs(t) < crossings) * (cutoff / rate)
        samples = np.einsum("cnk,nk->cn", waveform[:, inputs], kernels.astype(np.float32))
        out[:, first - start:first - start + len(time)] = samples
    return out


def mel_filters(bins: int, rate: int = RATE) -> np.ndarray:
    """Returns float64[M, fft/2]: triangles, evenly spaced in mel from 20 Hz to the Nyquist frequency (Kaldi's)."""
    half = _fft_size(rate) // 2
    low, high = _mel(LOWEST), _mel(rate / 2)
    step = (high - low) / (bins + 1)
    rise = (_mel(rate / 2 / half * np.arange(half)) - low) / step - np.arange(bins)[:, None]
    return np.maximum(np.minimum(rise, 2 - rise), 0)


def _mel(hertz):
    return 1127.0 * np.log(1.0 + hertz / 700.0)


def log_mel(waveform: np.ndarray, bins: int, rate: int = RATE) -> np.ndarray:
    """Returns float32[M,T] of float[samples]: Kaldi's filter bank (torchaudio.compliance.kaldi.fbank).

    Frames of 25 ms every 10 ms, as many as fit; their mean removed, pre-emphasis 0.97, Hann window, log of the power.
    """
    length, shift = int(rate * 0.025), int(rate * 0.010)
    if len(waveform) < length:
        return np.zeros((bins, 0), np.float32)
    frames = np.lib.stride_tricks.sliding_window_view(waveform, length)[::shift].astype(np.float64)
    frames = frames - frames.mean(1, keepdims=True)
    frames = frames - 0.97 * np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
    power = np.abs(np.fft.rfft(frames * np.hanning(length), _fft_size(rate))) ** 2
    energies = mel_filters(bins, rate) @ power[:, :-1].T
    return np.log(np.maximum(energies, np.finfo(np.float32).eps)).astype(np.float32)


def _fft_size(rate: int) -> int:
    return 2 ** math.ceil(math.log2(int(rate * 0.025)))


def sound(source: str | Path | tuple[np.ndarray, int], bins: int = 128, frames: int = 204, clips: int = 3,
          seconds: float = 2.0) -> np.ndarray:
    """Returns float32[clips,1,M,T]: normalised log-mel spectrograms of evenly spaced clips, padded to T with 0 before
    the normalisation.

    source: a PCM .wav file, or (float[C,samples], samples a second)
    The mean over all channels is subtracted from each clip, and the first channel is used. As in the original,
    overlapping clips share their samples, so a clip includes the subtracted means of earlier ones.
    """
    waveform, rate = source if isinstance(source, tuple) else read_wav(source)
    if waveform.ndim != 2 or waveform.size == 0 or not np.issubdtype(waveform.dtype, np.floating):
        raise ValueError("A sound must be float[C,samples] between -1 and 1 with at least one sample, got "
                         f"{waveform.dtype}{list(waveform.shape)}.")
    _check_sound(len(waveform), rate)
    check_finite(waveform)
    parts = _parts(waveform.astype(np.float32), int(rate), clips, seconds)
    out = np.zeros((clips, 1, bins, frames), np.float32)
    for i, clip in enumerate(parts):
        clip -= clip.mean(dtype=np.float64).astype(np.float32)
        mels = log_mel(clip[0], bins)[:, :frames]
        out[i, 0, :, :mels.shape[1]] = mels
    return (out - np.float32(SOUND_MEAN)) / np.float32(SOUND_STD)


def _parts(waveform: np.ndarray, rate: int, clips: int, seconds: float) -> Iterator[np.ndarray]:
    """Yields float32[C,samples] of each clip, at 16 kHz; overlapping clips share their memory.

    If the whole sound would take much memory after upsampling, each clip is resampled separately; none overlap then.
    """
    length = -(-RATE * waveform.shape[1] // rate)
    slow = rate < RATE // 4 and length * len(waveform) > WHOLE and length >= clips * seconds * RATE
    whole = None if slow else resample(waveform, rate, RATE)
    for start, end in clip_times(length / RATE, clips, seconds):
        first, last = int(start * RATE), min(int(end * RATE), length)
        yield resampled_part(waveform, rate, RATE, first, last) if slow else whole[:, first:last]


# ---- text ----

MOST_MERGES = 2**26  # bytes of a file of merges, unpacked; the original's has 3 MB


class WordTokenizer:
    """CLIP's byte pair encoding: lower case, merges within words, a suffix on each word's last piece.

    path:  the merges (`bpe_simple_vocab_16e6.txt.gz`), after a header line
    vocab: size of the vocabulary, which determines the number of merges

    Left out: the original first repairs wrongly decoded text (ftfy).
    """

    def __init__(self, path: str | Path, vocab: int = 49_408):
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        self._letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
        single = list(self._letters.values())
        count = vocab - 2 * len(single) - 2
        lines = _unpacked(path).split("\n")[1:count + 1]
        merges = [tuple(line.split()) for line in lines]
        if len(merges) < count or any(len(merge) != 2 for merge in merges):
            usable = sum(len(merge) == 2 for merge in merges)
            raise ValueError(f"{path} has {usable} merges, but a vocabulary of {vocab} needs {count}.")
        self._ranks = {merge: rank for rank, merge in enumerate(merges)}
        pieces = [*single, *(letter + "</w>" for letter in single), *("".join(merge) for merge in merges),
                  "<|startoftext|>", "<|endoftext|>"]
        self._ids = {piece: i for i, piece in enumerate(pieces)}
        self.start, self.end = vocab - 2, vocab - 1
        self._word = functools.lru_cache(maxsize=None)(self._word)

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a text, without the start and end tokens."""
        text = re.sub(r"\s+", " ", html.unescape(html.unescape(text)).strip()).strip().lower()
        return [i for word in _words(text) for i in self._word(word)]

    def rows(self, texts: Sequence[str], context: int = 77, keep_end: bool = False) -> np.ndarray:
        """Returns int32[B,context]: start, tokens, end, zeros.

        A text that is too long is truncated together with its end token, as in ImageBind-LLM; with `keep_end` the last
        token is the end token, as in ImageBind.
        """
        out = np.zeros((len(texts), context), np.int32)
        for row, text in zip(out, texts, strict=True):
            ids = [self.start, *self.encode(text), self.end]
            row[:len(ids)] = ids[:context]
            if keep_end and len(ids) > context:
                row[-1] = self.end
        return out

    def _word(self, word: str) -> list[int]:
        if word in ("<|startoftext|>", "<|endoftext|>"):
            return [self._ids[word]]
        parts = [self._letters[byte] for byte in word.encode("utf-8")]
        parts[-1] += "</w>"
        while len(parts) > 1:
            first = min(zip(parts, parts[1:], strict=False), key=lambda pair: self._ranks.get(pair, math.inf))
            if first not in self._ranks:
                break
            joined, i = [], 0
            while i < len(parts):
                width = 2 if tuple(parts[i:i + 2]) == first else 1
                joined.append("".join(parts[i:i + width]))
                i += width
            parts = joined
        return [self._ids[part] for part in parts]


def _unpacked(path: str | Path) -> str:
    """Returns the text in a gzip file. Raises ValueError naming a file that is damaged or unpacks to too much."""
    try:
        with gzip.open(path) as file:
            content = file.read(MOST_MERGES + 1)
        if len(content) > MOST_MERGES:
            raise ValueError(f"it unpacks to more than {MOST_MERGES:,} bytes")
        return content.decode("utf-8")
    except FileNotFoundError:
        raise
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"{path} is not a gzip file of merges that can be read: {error}. Download it again."
                         ) from error


_SHORT = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d")
_RUN = re.compile(r"L+|N|x+")


def _words(text: str) -> list[str]:
    """Splits text as the original: endings such as 's, runs of letters, single digits, runs of other non-spaces."""
    kinds = "".join(
        " " if char.isspace() else {"L": "L", "N": "N"}.get(unicodedata.category(char)[0], "x") for char in text)
    words, position = [], 0
    while position < len(text):
        match = _SHORT.match(text, position) or _RUN.match(kinds, position)
        if match:
            words.append(text[position:match.end()])
        position = match.end() if match else position + 1
    return words


# ---- batches ----

NAMES = ("video", "audio", "depth", "thermal", "imu", "text")  # of `Sample.media`


def stack(samples: Sequence[Sample], cfg: Any, merges: Path | None = None) -> dict[str, Any]:
    """Returns the fields `images`, `image_valid`, `media` and `weights` of the `Batch` of these rows.

    cfg:    `FamilyConfig.media`, whose towers have the sizes of the inputs
    merges: file of the text tower's merges, needed for text that is not tokenised

    Inputs of a sample, each with its weight, by default 1:
        image    `images`, at most one: a path, a PIL image, uint8[H,W,3], or normalised float32[3,S,S]
        video    (uint8[N,H,W,3], frames a second), or normalised float32[clips,3,frames,S,S]
        audio    a .wav file, (float[C,samples], samples a second), or spectrograms float32[clips,1,M,T]
        depth    normalised float32[1,S,S], or distances in metres float[H,W] (see `depth`)
        thermal  float32[1,S,S]                 imu   float32[6,steps]        text   a string, or tokens int[77]
    A row without a sense that another row has gets zeros with the weight 0. A sample without inputs gets an image of
    zeros with the weight 1, as the original's rows of text alone. These are zeros after the normalisation, which the
    model does, since pixels take a quarter of the bytes; `image_valid` marks the rows with an image. If one image is
    already normalised, all are normalised here, and `image_valid` is None.

    Raises ValueError naming the rows and senses that cannot be used, and the senses of this model.
    """
    read, problems = [], []
    for row, sample in enumerate(samples):
        inputs, messages = _inputs(sample, cfg, merges)
        read.append(inputs)
        problems += [f"row {row}, {message}" for message in messages]
    if any("image" in inputs and inputs["image"].dtype == np.float32 for inputs in read):
        for sample, inputs in zip(samples, read, strict=True):
            if "image" in inputs:
                inputs["image"] = normalise(inputs["image"]) * np.float32(bool(sample.images))
    first = {name: (row, array) for row, inputs in reversed([*enumerate(read)]) for name, array in inputs.items()}
    problems += [f"row {row}, {name}: {list(array.shape)}, but row {first[name][0]} has {list(first[name][1].shape)}"
                 for row, inputs in enumerate(read) for name, array in inputs.items()
                 if array.shape != first[name][1].shape]
    if problems:
        senses = [name for name in ("image", *NAMES) if sense_of(name) in cfg.towers]
        raise ValueError("The senses of these rows cannot be used:\n  " + "\n  ".join(problems)
                         + f"\nThe senses of this model are {', '.join(senses)}.")
    media = {name: np.stack([inputs.get(name, np.zeros_like(like)) for inputs in read])
             for name, (_, like) in first.items()}
    image, valid = media.pop("image", None), None
    if image is not None and image.dtype == np.uint8:
        valid = np.array([[bool(sample.images)] for sample in samples])
    weights = {name: np.array([sample.weights.get(name, 1.0) if name in inputs else 0.0
                               for sample, inputs in zip(samples, read, strict=True)], np.float32) for name in first}
    return {"images": None if image is None else image[:, None], "image_valid": valid, "media": media or None,
            "weights": weights}


def _inputs(sample: Sample, cfg: Any, merges: Path | None) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns a sample's inputs of the towers by sense, and messages about its problems."""
    problems = [f"{name}: there is no such sense (images go into `images`)" for name in sample.media
                if name not in NAMES]
    given = {name: source for name, source in sample.media.items() if name in NAMES}
    if sample.images:
        given["image"] = sample.images
    inputs = {}
    for name, source in given.items():
        try:
            inputs[name] = _input(name, source, cfg, merges)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    for name, weight in sample.weights.items():
        if name not in given:
            problems.append(f"{name}: a weight of {weight!r}, but no input")
        elif not (math.isfinite(weight) and weight >= 0):
            problems.append(f"{name}: a weight of {weight!r}, but weights are finite and not negative")
    if not given and not problems:
        if cfg.vision is None:
            problems.append("no input: an image of zeros is needed, but this model has no tower for images")
        else:
            inputs["image"] = np.zeros((cfg.vision.image_size, cfg.vision.image_size, 3), np.uint8)
    return inputs, problems


def _input(name: str, source: Any, cfg: Any, merges: Path | None) -> np.ndarray:
    """Returns the input of one sense; raises ValueError saying what is expected instead."""
    tower = cfg.towers.get(sense_of(name))
    if tower is None:
        raise ValueError("this model has no tower for this sense")
    if name == "image":
        if len(source) > 1:
            raise ValueError(f"{len(source)} images, but a row takes one")
        return load(source[0], tower.image_size, "center_crop")
    if name == "video" and isinstance(source, tuple):
        frames, fps = source
        return video(np.asarray(frames), fps, tower.image_size, shown=tower.frames)
    if name == "video":
        return _floats(source, (None, 3, tower.frames, tower.image_size, tower.image_size))
    if name == "audio" and isinstance(source, tuple):
        waveform, rate = source
        return sound((np.asarray(waveform), rate), tower.height, tower.width)
    if name == "audio" and isinstance(source, (str, os.PathLike)):
        return sound(source, tower.height, tower.width)
    if name == "audio":
        return _floats(source, (None, *tower.input_shape))
    if name == "text":
        return _text_row(source, tower, merges)
    if name == "depth" and np.ndim(source) == 2 and np.issubdtype(np.asarray(source).dtype, np.floating):
        return depth(np.asarray(source), tower.input_shape[-1])
    return _floats(source, tower.input_shape)


def _floats(source: Any, shape: tuple[int | None, ...]) -> np.ndarray:
    """Returns float32 of that shape, where None is any size but 0."""
    array = np.asarray(source)
    fits = len(array.shape) == len(shape) and all(
        size == wanted if wanted else size for size, wanted in zip(array.shape, shape, strict=True))
    if not fits or not np.issubdtype(array.dtype, np.floating):
        wanted = ",".join("clips" if size is None else str(size) for size in shape)
        raise ValueError(f"must be float32[{wanted}], got {array.dtype}{list(array.shape)}")
    check_finite(array)
    return array.astype(np.float32)


def _text_row(source: Any, tower: Any, merges: Path | None) -> np.ndarray:
    if isinstance(source, str):
        if merges is None or not merges.is_file():
            raise ValueError(f"the text tower's merges, {WORDS}, are not among the checkpoint's tokenizer files; put "
                             "the file there (or convert again with `words`), or give tokens")
        return word_tokenizer(merges, tower.vocab).rows([source], tower.context)[0]
    ids = np.asarray(source)
    if ids.shape != tower.input_shape or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"must be a string or int[{tower.context}], got {ids.dtype}{list(ids.shape)}")
    if not ((ids >= 0) & (ids < tower.vocab)).all():
        raise ValueError(f"tokens must be from 0 to {tower.vocab - 1}, got {ids.min()} to {ids.max()}")
    return ids.astype(np.int32)


@functools.lru_cache(maxsize=4)
def word_tokenizer(path: Path, vocab: int) -> WordTokenizer:
    """Returns a `WordTokenizer`, read once."""
    return WordTokenizer(path, vocab)
