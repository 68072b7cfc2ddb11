"""Runs all benchmarks or some of them, mmjax compared with PyTorch.

    python -m benchmarks.run                               on a CPU, ten minutes or so
    python -m benchmarks.run --only step captions          parts of it
    python -m benchmarks.run --size 7b                     at full size, in bfloat16, on one GPU
    python -m benchmarks.run --ours                        without PyTorch

Needs the extra `bench`. Both sides compute the same from the same weights, which is checked before the timing, and
alternate in one process; figures are medians. In addition to the table, benchmarks.json and benchmarks.png are written
to `--out` after every part.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from benchmarks import machine, rows, startup, training
from benchmarks.machine import ROOT
from benchmarks.rows import Row
from benchmarks.sizes import SIZES, Size

Part = Callable[[Size, int, Sequence[str]], list[Row]]


def generation(size: Size, rounds: int, names: Sequence[str]) -> list[Row]:
    """Prefill and decoding: `benchmarks/generate.py`."""
    found = []
    for one in _script("generate.py", "--turns", str(rounds))["results"]:
        for phase, target in (("prefill", 1.0), ("decode", 2.5)):
            part = one[phase]
            shares = {"ours": part["ours_of_floor"], "theirs": part["theirs_of_floor"]} if phase == "decode" else {}
            found.append(Row(f"{phase}, {one['rows']} row" + "s" * (one["rows"] > 1), "tokens/s", part["ours"],
                             part["theirs"], ceiling=shares, target=target))
    return found


def conversion(size: Size, rounds: int, names: Sequence[str]) -> list[Row]:
    """Conversion against a plain copy of the same files: `benchmarks/convert.py`."""
    found = _script("convert.py")
    return [Row("conversion against a file copy", "MB/s", found["bytes"] / found["converting"] / 1e6,
                found["bytes"] / found["copying"] / 1e6, target=0.7, memory={"ours": found["peak"]},
                note=f"{found['bytes'] / 1e9:.1f} GB; the other side is the copy")]


def images(size: Size, rounds: int, names: Sequence[str]) -> list[Row]:
    """The data pipeline against Pillow alone: `benchmarks/data.py`."""
    found = _script("data.py", "--count", "200", "--turns", str(rounds))
    return [Row(f"data, {name}", "samples/s", speed, found["floor"], note="the other side is Pillow alone")
            for name, speed in found["pipeline"].items()]


def _script(name: str, *arguments: str) -> dict[str, Any]:
    """Runs a benchmark script and returns its JSON."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        done = subprocess.run([sys.executable, ROOT / "benchmarks" / name, *arguments, "--json", out],
                              capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"benchmarks/{name} ended with status {done.returncode}:\n{done.stderr[-4000:]}")
        return json.loads(out.read_text())


PARTS: dict[str, Part] = {**training.PARTS, "generate": generation, "convert": conversion, "data": images,
                          **startup.PARTS}
NEEDS_TORCH = ("generate",)
LONG = ("convert", "data")  # minutes each: only with --only


def run(size: Size, only: Sequence[str], names: Sequence[str], console: Console,
        out: Path) -> tuple[list[Row], dict[str, Any]]:
    """Returns (rows, facts about the machine and the run), and writes them to the folder `out` after every part."""
    begun = time.monotonic()
    facts = about(size, names)
    found: list[Row] = []
    for name in only:
        console.print(f"{name} ...", highlight=False)
        found += PARTS[name](size, size.turns, names)
        facts["seconds"] = round(time.monotonic() - begun)
        rows.write(found, facts, out)
    return found, facts


def about(size: Size, names: Sequence[str]) -> dict[str, Any]:
    """Returns what the figures depend on: versions, the device and its peak performance."""
    top = machine.ceiling(size.matmul, size.stream, size.dtype, training.device(), "theirs" in names)
    packages = ("mmjax", "jax", "flax", *(("torch", "transformers") if "theirs" in names else ()))
    return {
        "size": size.name, "dtype": size.dtype, "device": _device(), "cores": machine.cores(),
        "python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages},
        "matmul_gflops": {side: round(speed / 1e9, 1) for side, speed in top.matmul.items()},
        "copy_gb_per_second": round(top.copy / 1e9, 1), "read_gb_per_second": round(top.read / 1e9, 1)}


def _device() -> str:
    if jax.default_backend() != "cpu":
        return jax.devices()[0].device_kind
    return f"{machine.cores()} CPU cores"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--only", nargs="+", choices=PARTS, help=f"default: all but {' and '.join(LONG)}")
    parser.add_argument("--ours", action="store_true", help="mmjax alone, where PyTorch is not installed")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder for the JSON and the image")
    args = parser.parse_args(arguments)
    if not args.ours and importlib.util.find_spec("torch") is None:
        parser.error("PyTorch is not installed: pip install 'mmjax[bench]', or --ours for mmjax alone.")
    names = ("ours",) if args.ours else ("ours", "theirs")
    only = args.only or [name for name in PARTS if name not in LONG]
    only = [name for name in only if not (args.ours and name in NEEDS_TORCH)]
    console = Console(width=150) if not sys.stdout.isatty() else Console()
    found, facts = run(SIZES[args.size], only, names, console, args.out)
    console.print("  ".join(f"{name} {value}" for name, value in facts.items()), highlight=False)
    rows.show(found, console)
    console.print(f"Written to {args.out}.", highlight=False)


if __name__ == "__main__":
    main()
