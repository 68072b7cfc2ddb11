"""Reads mutated files with every reader of the package, under an audit hook.

    python -m benchmarks.mutations                       10,000 files, about half an hour
    python -m benchmarks.mutations --count 300           fewer
    python -m benchmarks.mutations --only wav npy        some of the readers
    python -m benchmarks.mutations --keep FOLDER         keeps the files that failed

Each file is a small valid one with random changes: bytes, lengths, and values of JSON. Every mutated file must give a
result, or a ValueError or OSError, within ten seconds of the processor and one gigabyte, and must not execute
anything, open a network connection or write a file. Counts what was read, refused, and what failed; exit status 1 if
anything failed.

Every reader has a process of its own. A process that dies or does not end fails the file that it was reading, and
another one goes on.
"""

import argparse
import collections
import contextlib
import dataclasses
import io
import json
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import hostile, machine

SECONDS, BYTES = 10, 2**30  # of one file
# Audit events of executing, connecting and writing. "open" counts if the file is opened for writing.
FORBIDDEN = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "pickle.find_class", "exec",
             "shutil.rmtree", "os.remove", "os.rename", "socket.connect", "socket.getaddrinfo", "ctypes.dlopen")


@dataclasses.dataclass(frozen=True)
class Reader:
    """A reader and its valid files.

    files:   {name: content}
    mutated: names of the files that are changed; every one by default
    read:    reads the folder with the files
    writes:  whether it writes to its files, as a log that is continued does
    """

    files: Mapping[str, bytes]
    read: Callable[[Path], Any]
    mutated: Sequence[str] = ()
    writes: bool = False


# ---- the readers ----


def _jpeg() -> bytes:
    return hostile.encoded("JPEG", (12, 9), "RGB")


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in (("a.jpg", _jpeg()), ("a.txt", b"A dog."), ("b.jpg", _jpeg()),
                              ("b.json", _json({"caption": "A cat."}))):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def _parquet() -> bytes:
    import pyarrow
    from pyarrow import parquet

    file = io.BytesIO()
    rows = [{"image": {"bytes": _jpeg(), "path": "a.jpg"}, "caption": "A dog."}] * 3
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def _drained(format: str, name: str) -> Callable[[Path], Any]:
    """Returns a function that reads all records of a format and their images."""
    from mmjax.data import images
    from mmjax.data.formats import FORMATS

    def read(folder: Path) -> int:
        count = 0
        for record in FORMATS[format](str(folder / name)):
            try:
                for image in record.images:
                    images.rgb(image)
            except (ValueError, OSError):
                continue
            count += record.problem is None
        return count

    return read


def _formats() -> Iterator[tuple[str, Reader]]:
    jpeg = _jpeg()
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
    coco = "train2014/COCO_train2014_000000000001.jpg"
    yield "cc_sbu_align", Reader({"filter_cap.json": _json({"annotations": [{"image_id": "1", "caption": "A dog."}]}),
                                  "image/1.jpg": jpeg}, _drained("cc_sbu_align", "."), ("filter_cap.json",))
    yield "jsonl", Reader({"a.jsonl": b"\n".join(map(_json, [
        {"image": "1.jpg", "caption": "A dog."}, {"images": ["1.jpg", "1.jpg"], "prompt": "What?", "answer": "A"},
        {"image": None, "turns": [["Hi", "Hello"], ["And?", "No"]]}])), "1.jpg": jpeg},
        _drained("jsonl", "a.jsonl"), ("a.jsonl",))
    yield "llava_instruct", Reader({"a.json": _json([{"id": "1", "image": "1.jpg", "conversations": talk}] * 2),
                                    "1.jpg": jpeg}, _drained("llava_instruct", "a.json"), ("a.json",))
    yield "imagebind_llm_finetune", Reader({
        "finetune.yaml": b"META:\n- a.json\n", "a.json": _json([{"image": "1.jpg", "conversations": talk},
                                                                {"instruction": "Sort.", "input": "b", "output": "a"}]),
        "1.jpg": jpeg}, _drained("imagebind_llm_finetune", "."), ("finetune.yaml", "a.json"))
    yield "imagebind_llm_pretrain", Reader({
        "pretrain.yaml": b"META:\n- a.tsv\n", "a.tsv": b"url\tcaption\n1.jpg\tA dog.\n1.jpg\tsaid \"b\"\n",
        "1.jpg": jpeg}, _drained("imagebind_llm_pretrain", "."), ("pretrain.yaml", "a.tsv"))
    yield "coco_captions", Reader({"annotations/captions_train2014.json": _json({
        "images": [{"id": 1, "file_name": "COCO_train2014_000000000001.jpg"}],
        "annotations": [{"image_id": 1, "id": 2, "caption": "A dog."}]}), coco: jpeg},
        _drained("coco_captions", "annotations/captions_train2014.json"), ("annotations/captions_train2014.json",))
    yield "vqa", Reader({
        "v2_OpenEnded_mscoco_train2014_questions.json": _json({"data_subtype": "train2014", "questions": [
            {"image_id": 1, "question": "What?", "question_id": 3}]}),
        "v2_mscoco_train2014_annotations.json": _json({"annotations": [
            {"question_id": 3, "answers": [{"answer": "dog"}]}]}), coco: jpeg}, _drained("vqa", "."),
        ("v2_OpenEnded_mscoco_train2014_questions.json", "v2_mscoco_train2014_annotations.json"))
    yield "gqa", Reader({"train_balanced_questions.json": _json({"1": {
        "imageId": "1", "question": "Is it?", "answer": "yes"}}), "images/1.jpg": jpeg}, _drained("gqa", "."),
        ("train_balanced_questions.json",))
    refs = [{"sentences": [{"raw": "left dog"}], "split": "train", "image_id": 1, "ann_id": 5}]
    yield "refcoco", Reader({
        "r/refs(unc).p": pickle.dumps(refs, 2), "r/instances.json": _json({
            "images": [{"id": 1, "width": 12, "height": 9}], "annotations": [{"id": 5, "bbox": [1, 2, 3, 4]}]}),
        coco: jpeg}, _drained("refcoco", "r"), ("r/refs(unc).p", "r/instances.json"))
    yield "webdataset", Reader({"0.tar": _tar()}, _drained("webdataset", "0.tar"))
    yield "parquet", Reader({"a.parquet": _parquet()}, _drained("parquet", "a.parquet"))


def _files() -> Iterator[tuple[str, Reader]]:
    from mmjax.data import arrays, images, neighbours, senses
    from mmjax.inference import requests
    from mmjax.training import metrics_log

    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"):
        yield f"image_{kind.lower()}", Reader(
            {"a": hostile.encoded(kind, (40, 30), "RGB")}, lambda folder: images.load(folder / "a", 32, "center_crop"))
    yield "wav", Reader({"a.wav": hostile.wav(16_000, 12_800)}, lambda folder: senses.sound(folder / "a.wav"))
    extensible = hostile.wav(16_000, 12_800)
    extensible = (extensible[:16] + struct.pack("<I", 40) + struct.pack("<H", 0xFFFE) + extensible[22:36]
                  + struct.pack("<HHIH", 22, 16, 4, 1) + bytes.fromhex("000000001000800000aa00389b71")
                  + extensible[36:])
    yield "wav_extensible", Reader({"a.wav": extensible}, lambda folder: senses.sound(folder / "a.wav"))
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    yield "npy", Reader({"a.npy": _npy(array)}, lambda folder: senses.read_array("imu", folder / "a.npy"))
    packed = io.BytesIO()
    np.savez_compressed(packed, a=array, b=array)
    yield "npz", Reader({"a.npz": packed.getvalue()}, lambda folder: arrays.read_npz(folder / "a.npz"))
    yield "recall", Reader({"a.npy": _npy(array)}, lambda folder: neighbours.read(folder / "a.npy"))
    flat = b"IxFI" + neighbours.HEADER.pack(4, 3, 0, 0, True, 0) + struct.pack("<Q", 12) + array.tobytes()
    yield "recall_faiss", Reader({"a.index": flat}, lambda folder: neighbours.read(folder / "a.index"))
    depth = io.BytesIO()
    Image.fromarray(np.arange(700, 1300, dtype=np.uint16).reshape(20, 30)).save(depth, "PNG")
    yield "depth", Reader({"a.png": depth.getvalue()},
                          lambda folder: senses.depth(senses.read_depth(folder / "a.png"), 16))
    yield "requests", Reader({"a.jsonl": b"\n".join(map(_json, [
        {"image": "a.jpg", "prompt": "What?"}, {"id": "b", "images": ["a.jpg"], "prompt": "<ImageHere>?",
                                                "media": {"audio": "a.wav"}, "weights": {"audio": 0.5}}]))},
        lambda folder: requests.read_jsonl(folder / "a.jsonl"))
    yield "metrics_log", Reader({"m.jsonl": b'{"step": 0, "loss": 2.5}\n{"step": 1, "loss": 2.4}\n'},
                                lambda folder: metrics_log.JsonlLog(folder / "m.jsonl", "step", 9), writes=True)


def _checkpoints(base: Path) -> Iterator[tuple[str, Reader]]:
    """base: a converted checkpoint of a tiny model"""
    from mmjax.checkpoints import converted
    from mmjax.checkpoints import training as training_checkpoints
    from mmjax.config import RunConfig
    from mmjax.data import features, manifest
    from mmjax.families import shapes
    from mmjax.inference import chat
    from mmjax.tokenizer import Tokenizer

    card = (base / "config.json").read_bytes()

    def open_checkpoint(folder: Path) -> Any:
        source = converted.ConvertedCheckpoint.open(folder)
        return shapes(source.family, source.config)

    yield "checkpoint_card", Reader({"config.json": card}, open_checkpoint)
    run = {"format": converted.FORMAT, "id": "a", "checkpoint": ".", "start_from": None,
           "architecture": json.loads(card)["architecture"], "config": dataclasses.asdict(RunConfig())}

    def open_run(folder: Path) -> Any:
        source = converted.read_run(folder)
        chat.scenes_of(folder)
        return shapes(source.family, source.config), converted.lineage(folder)

    yield "run_card", Reader({"run.json": _json(run), "config.json": card}, open_run, ("run.json",))
    tokenizer = {path.name: path.read_bytes() for path in (base / "tokenizer").iterdir()}
    yield "tokenizer", Reader(tokenizer, lambda folder: Tokenizer.from_folder(folder).encode("A dog."))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "1" / "d").mkdir(parents=True)
        (Path(folder) / "1" / "d" / "0").write_bytes(b"content")
        training_checkpoints.seal(Path(folder) / "1", training_checkpoints.Progress(records=(3,), frozen={"a": 1}),
                                  "a", 1)
        seal = (Path(folder) / "1" / training_checkpoints.SEAL).read_bytes()
    yield "seal", Reader({"1/seal.json": seal, "1/d/0": b"content"},
                         lambda folder: training_checkpoints.verify(folder / "1", "a"), ("1/seal.json",))
    stored = features.Card({"vit": "a"}, {"fit": "stretch"}, 1, 0, "float32", (2, 3), ("/data",))
    index = features.FeatureIndex.of({0: np.arange(6, dtype=np.uint64).reshape(3, 2)})
    yield "features", Reader({
        "features.json": _json({"format": features.FORMAT} | dataclasses.asdict(stored)), "index.npy": _npy(index)},
        lambda folder: features.Features(folder).find(None))
    making = manifest.Making("jsonl", "a.jsonl", None, "jsonl", 4, False, 3)
    shard = manifest.Shard(0, "a.array_record", 3, 0, 10, "0" * 64, "a", "b")
    yield "manifest", Reader({manifest.FILE: "".join(map(manifest.line_of, (making, shard))).encode()}, _manifest)


def _manifest(folder: Path) -> Any:
    from mmjax.data import manifest

    stored = manifest.read(folder)
    return None if stored is None else manifest.check(folder, stored)


def readers(base: Path | None = None) -> dict[str, Reader]:
    """Returns every reader by name. base: a converted checkpoint, for those of checkpoints; None: without them"""
    return dict([*_formats(), *_files(), *(_checkpoints(base) if base else ())])


# ---- mutations ----

VALUES = (None, True, False, -1, 0, 1, 2**31, 2**63, -2**63, 10**30, 1.5, 1e308, float("nan"), float("inf"), "", " ",
          "\0", "../../etc/passwd", "/etc/passwd", "a" * 10_000, "\ud800", "NaN", [], {}, [[]], [None], {"": {}})
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def mutate(content: bytes, draw: random.Random) -> bytes:
    """Returns content with a random change."""
    try:
        lines = [json.loads(line) for line in content.splitlines()] if b"\n{" in content else [json.loads(content)]
    except ValueError:
        lines = []
    if lines and draw.random() < 0.7:
        for _ in range(draw.randint(1, 3)):
            number = draw.randrange(len(lines))
            lines[number] = _mutate_value(lines[number], draw)
        return b"\n".join(map(_json, lines))
    return _mutate_bytes(content, draw)


def _mutate_bytes(content: bytes, draw: random.Random) -> bytes:
    changed, kind = bytearray(content), draw.randrange(6)
    place = draw.randrange(max(len(changed), 1)) if draw.random() < 0.5 else draw.randrange(min(len(changed), 200) or 1)
    if kind == 0:
        del changed[place:]
    elif kind == 1:
        for _ in range(draw.choice((1, 2, 8, 64))):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
    elif kind == 2:
        size = draw.choice((1, 2, 4, 8))
        changed[place:place + size] = (draw.choice(NUMBERS) % 256**size).to_bytes(size, draw.choice(("little", "big")))
    elif kind == 3:
        changed[place:place] = draw.choice((b"[" * 100_000, b"{\"a\":" * 5_000, b"\xff" * 8, b"\0" * 600, b"9" * 5_000,
                                            b"\n", b"\"", b"-", b"e400", b"\xef\xbb\xbf", b"\x1f\x8b"))
    elif kind == 4:
        end = min(place + draw.randrange(1, 40), len(changed))
        del changed[place:end]
    else:
        end = min(place + draw.randrange(1, 40), len(changed))
        changed[place:place] = changed[place:end] * draw.choice((1, 3, 50))
    return bytes(changed)


def _mutate_value(value: Any, draw: random.Random) -> Any:
    """Returns a value of JSON in which one value, at any depth, is replaced, removed or moved into brackets."""
    if isinstance(value, (dict, list)) and value and draw.random() < 0.85:
        copied = value.copy()
        key = draw.choice(sorted(copied)) if isinstance(copied, dict) else draw.randrange(len(copied))
        if draw.random() < 0.1:
            del copied[key]
        else:
            copied[key] = _mutate_value(copied[key], draw)
        return copied
    chosen = draw.randrange(4)
    if chosen == 0:
        for _ in range(draw.choice((1, 50, 250))):
            value = [value] if draw.random() < 0.5 else {"a": value}
        return value
    if chosen == 1 and isinstance(value, (int, float)) and not isinstance(value, bool):
        return draw.choice((-value, value * 1_000_003, value + 0.5, value - 1, str(value)))
    return draw.choice(VALUES)


# ---- reading ----


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a file: "read", "refused", "traceback", "executed", "memory", "time" or "died"."""

    reader: str
    number: int
    kind: str
    detail: str = ""


def files_of(reader: Reader, name: str, number: int) -> dict[str, bytes]:
    """Returns {name: content} of a reader's files with the mutation of that number."""
    draw = random.Random(f"{name} {number}")
    chosen = draw.choice(sorted(reader.mutated or reader.files))
    return {**reader.files, chosen: mutate(reader.files[chosen], draw)}


_watching, _may_write, _seen = False, False, []


def _importing() -> bool:
    """Returns whether a module is being imported, whose dataclasses and named tuples execute code of their own."""
    frame = sys._getframe()
    while frame and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    return frame is not None


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    writes = (event == "open" and not _may_write and isinstance(arguments[1], str)
              and set(arguments[1]) & set("wax+"))
    code = arguments[0] if event == "exec" else None
    imports = code is not None and code.co_filename.startswith((sys.prefix, sys.base_prefix))  # of installed modules
    allowed = imports or event == "exec" and _importing() or event == "os.rename" and _may_write
    if event in FORBIDDEN and not allowed or writes:
        _seen.append(f"{event} {arguments!r}"[:200])


def watch() -> None:
    """Adds the audit hook, which stays until the process ends."""
    sys.addaudithook(_watch)


@contextlib.contextmanager
def watching(may_write: bool = False) -> Iterator[list[str]]:
    """Yields the list of what must not happen, which the audit hook of `watch` fills meanwhile."""
    global _watching, _may_write
    _seen.clear()
    _watching, _may_write = True, may_write
    try:
        yield _seen
    finally:
        _watching = False


def attempt(reader: Reader, name: str, number: int, folder: Path) -> Outcome:
    """Reads the mutation of that number in an empty folder, in this process."""
    _write(folder, files_of(reader, name, number))
    machine.forget_peak()
    before, begun = machine.peak(), time.process_time()
    with watching(reader.writes):
        try:
            reader.read(folder)
            kind, detail = "read", ""
        except (ValueError, OSError) as error:
            kind, detail = "refused", str(error)
        except Exception as error:
            kind, detail = "traceback", f"{type(error).__name__}: {error}"[:300]
    seconds, peak = time.process_time() - begun, machine.peak() - before
    if _seen:
        kind, detail = "executed", _seen[0]
    elif peak > BYTES:
        kind, detail = "memory", f"{peak:,} bytes"
    elif seconds > SECONDS:
        kind, detail = "time", f"{seconds:.0f} s"
    return Outcome(name, number, kind, detail)


def worker(name: str, numbers: Sequence[int], base: Path, out: Any) -> None:
    """Reads these mutations in this process, and prints the outcomes as JSON lines to `out`."""
    os.environ["MMJAX_TAR_INDEX"] = "off"
    reader = readers(base)[name]
    with tempfile.TemporaryDirectory(prefix="mmjax-mutation-") as folder:  # imports, and what is compiled once
        _write(Path(folder), reader.files)
        try:
            reader.read(Path(folder))
        except (ValueError, OSError):
            pass
    watch()
    for number in numbers:
        signal.setitimer(signal.ITIMER_PROF, 2 * SECONDS)  # of the processor; ends the process
        signal.alarm(60 * SECONDS)  # for what waits instead
        with tempfile.TemporaryDirectory(prefix="mmjax-mutation-") as folder:
            outcome = attempt(reader, name, number, Path(folder))
        print(json.dumps(dataclasses.asdict(outcome)), file=out, flush=True)


def outcomes(name: str, numbers: Sequence[int], base: Path) -> Iterator[Outcome]:
    """Yields the outcomes of these mutations, read in another process; in a new one after a process that died."""
    while numbers:
        command = [sys.executable, "-m", "benchmarks.mutations", "--worker", name, "--base", str(base),
                   "--numbers", str(numbers[0]), str(numbers[-1] + 1)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                              cwd=machine.ROOT) as process:
            for line in process.stdout:
                if line.startswith('{"reader"'):
                    yield Outcome(**json.loads(line))
                    numbers = numbers[1:]
        if numbers:
            late = process.returncode in (-signal.SIGALRM, -signal.SIGPROF)
            yield Outcome(name, numbers[0], "time" if late else "died", f"status {process.returncode}")
            numbers = numbers[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--only", nargs="+", default=())
    parser.add_argument("--keep", type=Path, help="folder for the files that failed")
    for internal in ("--worker", "--base"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    parser.add_argument("--numbers", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, range(*options.numbers), Path(options.base), sys.stdout)
        return
    from tests import small

    base = small.checkpoint()
    chosen = {name: reader for name, reader in readers(base).items() if not options.only or name in options.only}
    each, total = -(-options.count // len(chosen)), collections.Counter()
    for name, reader in chosen.items():
        counts = collections.Counter()
        for outcome in outcomes(name, range(each), base):
            counts[outcome.kind] += 1
            if outcome.kind not in ("read", "refused"):
                print(f"  {name} {outcome.number}: {outcome.kind}: {outcome.detail}", flush=True)
                if options.keep:
                    _keep(options.keep / f"{name}-{outcome.number}", reader, outcome)
        print(f"{name:24} " + "  ".join(f"{kind} {count:,}" for kind, count in sorted(counts.items())), flush=True)
        total += counts
    print(f"{'all':24} " + "  ".join(f"{kind} {count:,}" for kind, count in sorted(total.items())))
    sys.exit(bool(total.keys() - {"read", "refused"}))


def _write(folder: Path, content: Mapping[str, bytes]) -> None:
    for path, each in content.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(each)


def _keep(folder: Path, reader: Reader, outcome: Outcome) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    _write(folder, files_of(reader, outcome.reader, outcome.number))


if __name__ == "__main__":
    main()
