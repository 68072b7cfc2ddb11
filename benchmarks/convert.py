"""Memory and speed of the conversion of a random language model in the released format.

    python benchmarks/convert.py                  3.2 GB of .bin shards, 10 GB of disk while it runs, about two minutes
    python benchmarks/convert.py --layers 4       a quick look

Prints the peak resident memory of the converting process (including Python and JAX) and its limit, 1.5 x the largest
parameter + 1 GB, and the time compared with a copy of the same files. Conversion and copy alternate; figures are
medians. Both read files from the page cache and end when the output is on the disk: the copy is `cp --reflink=never`
and an fsync of every file, the conversion's files are synced by TensorStore. The conversion's time includes the
SHA-256 of every source file, which is computed in parallel, but not the start of Python.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

TOKENIZER = Path(__file__).parents[1] / "tests/golden/minigpt4/ckpt/llama_hf"
SIZES = {"vocab_size": 32_000, "hidden_size": 2_048, "num_attention_heads": 16, "intermediate_size": 5_504}


def make(folder: Path, layers: int, shards: int = 4) -> None:
    """Writes a folder as transformers saves it, filled with noise."""
    from mmjax.convert import llama, torch_file
    from mmjax.convert.tables import Computed, Problems

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SIZES | {"num_hidden_layers": layers}))
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(TOKENIZER / name, folder / name)
    (folder / "added_tokens.json").write_text(json.dumps({"[LAST]": SIZES["vocab_size"] - 1}))
    noise = (0.02 * np.random.default_rng(0).standard_normal(2**24, np.float32)).astype(np.float16)

    def tensor(key: str, shape: tuple[int, ...]) -> Computed:
        values = np.ones if "norm" in key else lambda shape, dtype: np.resize(noise, shape)
        return Computed(key, shape, np.float16, lambda: values(shape, np.float16))

    entries = llama.entries(llama.read_config(folder, Problems()))
    tensors = {key: tensor(key, entry.key_shape) for entry in entries for key in entry.keys}
    where = {}
    for number, keys in enumerate(np.array_split(sorted(tensors), shards)):
        name = f"pytorch_model-{number + 1:05}-of-{shards:05}.bin"
        torch_file.save(folder / name, {str(key): tensors[str(key)] for key in keys})
        where |= {str(key): name for key in keys}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))


def copy(source: Path, target: Path) -> float:
    """Returns the seconds to copy a folder's files to the disk."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", "--reflink=never", source, target], check=True)
    for path in target.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - start


def convert(source: Path, out: Path) -> dict[str, float]:
    """Returns {"peak": bytes, "seconds"} of a conversion in a new process."""
    done = subprocess.run([sys.executable, __file__, "--convert", source, out], check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)


def turns(work: Path, layers: int, rounds: int) -> dict[str, float]:
    """Returns the benchmark's figures: bytes of the source and of the largest parameter, the conversion's peak memory,
    and the median seconds of the copy and of the conversion."""
    from mmjax.checkpoints import frozen as frozen_weights

    source, out, again = work / "llama", work / "out", work / "copy"
    make(source, layers)
    copying, converting, peak = [], [], 0
    for _ in range(rounds):
        copying.append(copy(source, again))
        shutil.rmtree(again)
        shutil.rmtree(out, ignore_errors=True)
        measured = convert(source, out)
        converting.append(measured["seconds"])
        peak = max(peak, measured["peak"])
    shapes = frozen_weights.metadata(out / "weights").values()
    return {"bytes": sum(path.stat().st_size for path in source.iterdir()),
            "largest": max(shape.size * shape.dtype.itemsize for shape in shapes), "peak": peak,
            "copying": statistics.median(copying), "converting": statistics.median(converting)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=29)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where to work (default: the system's temporary one)")
    parser.add_argument("--convert", nargs=2, type=Path, help=argparse.SUPPRESS)  # the measured process
    parser.add_argument("--json", type=Path, help="where to write the figures too")
    args = parser.parse_args()
    if args.convert:
        from mmjax.convert import write

        start = time.perf_counter()
        write.command("llama")(*args.convert)
        print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                          "seconds": time.perf_counter() - start}))
        return

    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        found = turns(Path(work), args.layers, args.rounds)
    size, peak, promised = found["bytes"], found["peak"], 1.5 * found["largest"] + 1e9
    print(f"source            {size / 1e9:.2f} GB")
    print(f"largest parameter {found['largest'] / 1e9:.2f} GB")
    print(f"peak memory       {peak / 1e9:.2f} GB   (promised: at most {promised / 1e9:.2f} GB)")
    print(f"plain copy        {found['copying']:.1f} s   {size / found['copying'] / 1e6:.0f} MB/s")
    print(f"conversion        {found['converting']:.1f} s   {size / found['converting'] / 1e6:.0f} MB/s, "
          f"{found['copying'] / found['converting']:.2f} x the copy's speed")
    if args.json:
        args.json.write_text(json.dumps(found) + "\n")
    if peak > promised:
        sys.exit("The conversion needs more memory than promised.")


if __name__ == "__main__":
    main()
