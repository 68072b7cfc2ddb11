"""Speed of the data pipeline compared with Pillow alone, and the time that a training step waits for batches.

    python benchmarks/data.py                     600 images, about two minutes

Floor: Pillow alone decodes the same JPEG files and resizes them (bicubic, 224 x 224) in as many threads. Pipeline: the
batches of a MiniGPT-4 run, one sample per row and packed, from the records' order to the arrays. Floor and pipeline
alternate in one process; the figures are medians.

Work of Python: the same pipeline without opening images. Only this part needs the GIL, so it gives the number of
samples that one process can feed to its devices with any number of cores.

Waiting: a run's loop with a simulated device that takes a given time per step; the share of the time that the loop
waits for batches.
"""

import argparse
import concurrent.futures
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from mmjax import sharding
from mmjax.config import DataConfig, MeshConfig, TextConfig
from mmjax.data import packing, pipeline
from mmjax.data.collate import Collator
from mmjax.families.minigpt4 import PRESETS
from mmjax.tokenizer import Tokenizer

TOKENIZER = Path(__file__).parents[1] / "tests/golden/minigpt4/ckpt/llama_hf"
TEXT = TextConfig("###Human: {} ###Assistant: ", end_sym="###", max_txt_len=160)
CONFIG = PRESETS["minigpt4-7b"]
SIDE = CONFIG.image_size
WORDS = ("a", "the", "dog", "red", "table", "on", "with", "near", "standing", "people", "and", "street")


def make(folder: Path, count: int) -> list[Path]:
    """Writes JPEG files in the CC-SBU-align layout, as detailed as photographs, with captions of log-normal length."""
    random = np.random.default_rng(0)
    (folder / "image").mkdir()
    annotations, files = [], []
    for number in range(count):
        width, height = random.integers(320, 800, 2)
        coarse = random.integers(0, 256, (height // 12, width // 12, 3), np.uint8)
        fine = random.normal(0, 6, (height, width, 3))
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.float32)
        files.append(folder / "image" / f"{number}.jpg")
        Image.fromarray(np.clip(smooth + fine, 0, 255).astype(np.uint8)).save(files[-1], quality=90)
        length = int(np.clip(random.lognormal(np.log(40), 0.6), 4, 150))
        annotations.append({"image_id": str(number), "caption": " ".join(random.choice(WORDS, length))})
    (folder / "filter_cap.json").write_text(json.dumps({"annotations": annotations}))
    return files


def floor(files: list[Path], threads: int) -> float:
    """Returns Pillow's samples per second."""

    def read(file: Path) -> np.ndarray:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))

    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        count = sum(1 for _ in pool.map(read, files))
    return count / (time.perf_counter() - start)


def speed(feed: Callable[[], Iterator[pipeline.PipelineBatch]], count: int) -> tuple[float, float]:
    """Returns (samples per second over about `count` samples, after the batches read ahead; share of valid slots)."""
    steps = feed()
    for _ in range(10):
        next(steps)
    start, seen, real, slots = time.perf_counter(), 0, 0, 0
    while seen < count:
        step = next(steps)
        seen += len(step.names)
        real += int(step.batch.valid.sum())
        slots += step.batch.valid.size
    return seen / (time.perf_counter() - start), real / slots


class Unopened(Collator):
    """A collator whose images are all black; no file is read."""

    def image(self, image: Any, random: np.random.Generator | None) -> np.ndarray:
        return self.blank


def waiting(feed: Callable[[], Iterator[pipeline.PipelineBatch]], seconds: float, rows: int, count: int) -> float:
    """Returns the share of time that a device waits for batches, if a step takes `seconds`. As in
    `mmjax.training.loop`, the next batch is fetched while the device computes, and one more step is dispatched."""
    mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    waited, began, ends = 0.0, 0.0, []
    for item in itertools.islice(feed(), count):
        jax.block_until_ready(sharding.put_batch(item.batch, mesh, rows))
        now = time.perf_counter()
        if len(ends) == 2:  # the first ones fill the buffers
            began = ends[-1]
        if len(ends) >= 2:
            waited += max(0.0, now - ends[-1])
        ends.append(max(now, *ends[-1:]) + seconds)
        if len(ends) > 1:
            time.sleep(max(0.0, ends[-2] - time.perf_counter()))  # reads the metrics of the step before
    return waited / (ends[-1] - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=600, help="images")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="where to write the figures too; without waiting")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        files = make(Path(folder), args.count)
        size = sum(file.stat().st_size for file in files)
        unpacked = DataConfig(path=folder, prompts=("<Img><ImageHere></Img> Describe this image in detail.",),
                           batch_size=12, threads=args.threads)
        packed = DataConfig(path=folder, prompts=unpacked.prompts, batch_size=4, threads=args.threads, pack_length=512,
                            pack_images=5)
        tokenizer = Tokenizer.from_folder(TOKENIZER)

        def feed(cfg: DataConfig, kind: type[Collator] = Collator) -> Callable[[], Iterator[pipeline.PipelineBatch]]:
            groups = packing.Groups.of(cfg, 1)
            records = pipeline.read(cfg)
            return lambda: pipeline.batches(records, cfg, kind(tokenizer, TEXT, CONFIG, groups))

        feeds = {"one sample a row": feed(unpacked), "packed": feed(packed)}
        unopened = {name: feed(cfg, Unopened) for name, cfg in zip(feeds, (unpacked, packed), strict=True)}
        floors, found = [], {name: [] for name in feeds}
        for turn in range(args.turns):
            floors.append(floor(files, args.threads))
            for name in sorted(feeds, reverse=turn % 2 == 1):
                found[name].append(speed(feeds[name], args.count))
        lowest = statistics.median(floors)
        print(f"{args.count} JPEG files of {size / args.count / 1e3:.0f} kB, {args.threads} threads, "
              f"medians of {args.turns} turns")
        print(f"{'floor':18} {lowest:6.1f} samples/s, {lowest / args.threads:.1f} a thread")
        for name, pairs in found.items():
            ratio = statistics.median(rate / base for (rate, _), base in zip(pairs, floors, strict=True))
            rate = statistics.median(rate for rate, _ in pairs)
            most = statistics.median(speed(unopened[name], 4 * args.count)[0] for _ in range(args.turns))
            print(f"{name:18} {rate:6.1f} samples/s, {ratio:.3f} of the floor; {pairs[0][1]:.3f} real tokens; "
                  f"without opening images {most:.0f} samples/s")
        if args.json:
            speeds = {name: statistics.median(rate for rate, _ in pairs) for name, pairs in found.items()}
            args.json.write_text(json.dumps({"floor": lowest, "pipeline": speeds}) + "\n")
            return
        for slack in (1.1, 1.5, 2.0):
            seconds = slack * unpacked.batch_size / lowest
            share = waiting(feeds["one sample a row"], seconds, unpacked.batch_size,
                            2 + args.count // unpacked.batch_size)
            print(f"steps {slack} x as long as the floor ({seconds:.2f} s): {share:.4f} of the time waiting")


if __name__ == "__main__":
    main()
