"""Memory and speed of the conversion, on a made-up language model in the released format.

    python benchmarks/convert.py                  3.2 GB of .bin shards, 7 GB of disk while it runs, about a minute
    python benchmarks/convert.py --layers 4       a quick look

Prints the peak resident memory of the converting process (its ru_maxrss, Python and JAX included) against what we
promise, 1.5 x the largest parameter + 1 GB, and the time against copying the same files and writing them through to
the disk. The conversion's figure includes the SHA-256 of every source file, computed beside it, but not the start of
Python (some seconds).
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

TOKENIZER = Path(__file__).parents[1] / "tests/golden/minigpt4/ckpt/llama_hf"
SIZES = {"vocab_size": 32_000, "hidden_size": 2_048, "num_attention_heads": 16, "intermediate_size": 5_504}


def make(folder: Path, layers: int, shards: int = 4) -> None:
    """A folder as transformers saves it, filled with noise."""
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


def copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target)
    for path in target.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=29)
    parser.add_argument("--folder", type=Path, default=None, help="where to work (default: the system's temporary one)")
    parser.add_argument("--convert", nargs=2, type=Path, help=argparse.SUPPRESS)  # the measured process
    args = parser.parse_args()
    if args.convert:
        from mmjax.convert import convert

        start = time.perf_counter()
        convert.llama(*args.convert)
        print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                          "seconds": time.perf_counter() - start}))
        return

    from mmjax import weights

    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        source, out = Path(work) / "llama", Path(work) / "out"
        make(source, args.layers)
        size = sum(path.stat().st_size for path in source.iterdir())
        start = time.perf_counter()
        copy(source, Path(work) / "copy")
        copying = time.perf_counter() - start
        shutil.rmtree(Path(work) / "copy")
        command = [sys.executable, __file__, "--convert", source, out]
        measured = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        peak, converting = measured["peak"], measured["seconds"]
        largest = max(shape.size * shape.dtype.itemsize for shape in weights.metadata(out / "weights").values())

    print(f"source            {size / 1e9:.2f} GB")
    print(f"largest parameter {largest / 1e9:.2f} GB")
    print(f"peak memory       {peak / 1e9:.2f} GB   (promised: at most {(1.5 * largest + 1e9) / 1e9:.2f} GB)")
    print(f"plain copy        {copying:.1f} s   {size / copying / 1e6:.0f} MB/s")
    print(f"conversion        {converting:.1f} s   {size / converting / 1e6:.0f} MB/s")
    if peak > 1.5 * largest + 1e9:
        sys.exit("The conversion needs more memory than promised.")


if __name__ == "__main__":
    main()
